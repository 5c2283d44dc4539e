// The format's names of element types. Private.
#pragma once

#include <optional>
#include <string_view>

#include "ssm/core/dtype.h"

namespace ssm {

// In the reference library's order: it writes tensors by descending place in this list.
struct SafetensorsDType {
    std::string_view name;
    DType dtype;
};
inline constexpr SafetensorsDType kSafetensorsDTypes[] = {
    {"BOOL", DType::boolean}, {"U8", DType::u8},   {"I8", DType::i8},     {"I16", DType::i16},
    {"U16", DType::u16},      {"F16", DType::f16}, {"BF16", DType::bf16}, {"I32", DType::i32},
    {"U32", DType::u32},      {"F32", DType::f32}, {"F64", DType::f64},   {"I64", DType::i64},
    {"U64", DType::u64},
};

constexpr std::optional<DType> dtype_from_safetensors(std::string_view name) {
    for (const auto& t : kSafetensorsDTypes) {
        if (t.name == name) return t.dtype;
    }
    return std::nullopt;
}
// Place in the list above.
constexpr int safetensors_rank(DType dtype) {
    int rank = 0;
    for (const auto& t : kSafetensorsDTypes) {
        if (t.dtype == dtype) break;
        ++rank;
    }
    return rank;
}
constexpr std::string_view safetensors_name(DType dtype) {
    return kSafetensorsDTypes[safetensors_rank(dtype)].name;
}

}  // namespace ssm
