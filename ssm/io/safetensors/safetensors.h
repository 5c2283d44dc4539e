// safetensors: named tensors in one file.
//
//   8 bytes     n, length of the header, little-endian
//   n bytes     JSON {"__metadata__": {k: v}, "name": {"dtype": "F32", "shape": [2, 3],
//               "data_offsets": [begin, end]}}
//   the rest    the tensors' bytes, row-major, little-endian; offsets count from here
//
// Source     https://github.com/huggingface/safetensors; as strict as its Rust library, plus: duplicate
//            names, unknown fields and more than 32 dimensions are errors.
// Reading    zero-copy: a Tensor points into the mapped file and keeps it alive; its content is READ-ONLY
//            (clone() it to change it). Data that is not aligned to its element is copied instead.
//            Everything is validated before anything of the size of the data is allocated.
// Errors     (bad_file) "[safetensors] DIR/model.safetensors: tensor 'a' ...", one line.
#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ssm/core/tensor.h"

namespace ssm {

struct TensorInfo {
    std::string name;
    DType dtype = DType::f32;
    Shape shape;
    size_t begin = 0, end = 0;  // bytes, from the start of the data
};

using Metadata = std::map<std::string, std::string>;

class SafetensorsFile {
public:
    static SafetensorsFile open(const std::filesystem::path& path);
    // From memory that `keep_alive` owns (null: the caller keeps it); `name` stands in messages.
    static SafetensorsFile parse(std::span<const std::byte> bytes, std::string name,
                                 std::shared_ptr<const void> keep_alive = nullptr);

    const std::string& name() const { return name_; }
    const Metadata& metadata() const { return metadata_; }
    // In the order of their data.
    const std::vector<TensorInfo>& tensors() const { return tensors_; }
    bool contains(std::string_view tensor) const { return find(tensor) != nullptr; }
    const TensorInfo* find(std::string_view tensor) const;  // null when absent
    // Throws when absent; the second form also when the shape is another.
    Tensor tensor(std::string_view tensor) const;
    Tensor tensor(std::string_view tensor, const Shape& shape) const;

private:
    std::string name_;
    Metadata metadata_;
    std::vector<TensorInfo> tensors_;
    std::map<std::string, size_t, std::less<>> index_;
    std::span<const std::byte> data_;
    std::shared_ptr<const void> keep_alive_;
};

struct NamedTensor {
    std::string name;
    Tensor tensor;  // may be a strided slice
};

// Writes one file, atomically (atomic_file.h), without a second copy of the data. Bytes as the reference
// library writes them: tensors ordered by descending alignment, then by name; header padded with spaces to a
// multiple of 8. Throws (invalid_argument) on an empty tensor, a name that appears twice or is not UTF-8.
void write_safetensors(const std::filesystem::path& path, const std::vector<NamedTensor>& tensors,
                       const Metadata& metadata = {{"format", "pt"}});

}  // namespace ssm
