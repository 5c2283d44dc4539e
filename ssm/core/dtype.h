// Element types, and bfloat16 as a storage type (arithmetic is always done in f32).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "ssm/core/error.h"

namespace ssm {

// bfloat16: the upper 16 bits of an IEEE-754 binary32.
struct bf16 {
    uint16_t bits;

    bf16() = default;
    // Round to nearest, ties to even; NaN stays a (quiet) NaN.
    explicit bf16(float x) {
        uint32_t u = std::bit_cast<uint32_t>(x);
        if ((u & 0x7fffffffu) > 0x7f800000u) {
            bits = static_cast<uint16_t>((u >> 16) | 0x40u);
        } else {
            bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
        }
    }
    explicit operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};
static_assert(sizeof(bf16) == 2);

enum class DType : uint8_t { f32, bf16, f16, f64, i8, u8, i16, u16, i32, u32, i64, u64, boolean };

constexpr size_t size_of(DType t) {
    switch (t) {
        case DType::f64:
        case DType::i64:
        case DType::u64: return 8;
        case DType::f32:
        case DType::i32:
        case DType::u32: return 4;
        case DType::bf16:
        case DType::f16:
        case DType::i16:
        case DType::u16: return 2;
        case DType::i8:
        case DType::u8:
        case DType::boolean: return 1;
    }
    return 0;
}

constexpr std::string_view name_of(DType t) {
    switch (t) {
        case DType::f32: return "f32";
        case DType::bf16: return "bf16";
        case DType::f16: return "f16";
        case DType::f64: return "f64";
        case DType::i8: return "i8";
        case DType::u8: return "u8";
        case DType::i16: return "i16";
        case DType::u16: return "u16";
        case DType::i32: return "i32";
        case DType::u32: return "u32";
        case DType::i64: return "i64";
        case DType::u64: return "u64";
        case DType::boolean: return "bool";
    }
    return "?";
}

template <class T>
inline constexpr DType dtype_of = [] { static_assert(sizeof(T) == 0, "no DType"); }();
template <>
inline constexpr DType dtype_of<float> = DType::f32;
template <>
inline constexpr DType dtype_of<bf16> = DType::bf16;
template <>
inline constexpr DType dtype_of<double> = DType::f64;
template <>
inline constexpr DType dtype_of<int32_t> = DType::i32;
template <>
inline constexpr DType dtype_of<uint32_t> = DType::u32;
template <>
inline constexpr DType dtype_of<int64_t> = DType::i64;
template <>
inline constexpr DType dtype_of<uint8_t> = DType::u8;
template <>
inline constexpr DType dtype_of<uint16_t> = DType::u16;

// Calls f.template operator()<T>() with T = float or bf16: the activation types.
template <class F>
decltype(auto) dispatch_activation(DType t, std::string_view where, F&& f) {
    if (t == DType::f32) return f.template operator()<float>();
    if (t == DType::bf16) return f.template operator()<bf16>();
    fail(ErrorCode::unsupported, where, "activations must be f32 or bf16 but are {}", name_of(t));
}

}  // namespace ssm
