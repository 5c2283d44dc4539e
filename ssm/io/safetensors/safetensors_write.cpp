#include <algorithm>
#include <cstdint>
#include <cstring>
#include <set>
#include <utility>

#include "ssm/core/error.h"
#include "ssm/io/atomic_file.h"
#include "ssm/io/json/json.h"
#include "ssm/io/printable.h"
#include "ssm/io/safetensors/dtype_names.h"
#include "ssm/io/safetensors/safetensors.h"

namespace ssm {
namespace {

constexpr size_t kAlignment = 8, kBuffer = size_t{1} << 20;

// `text` as a JSON string.
std::string json_string(const std::string& text) {
    try {
        return nlohmann::json(text).dump();
    } catch (const nlohmann::json::exception&) {
        fail(ErrorCode::invalid_argument, "safetensors", "name '{}' is not valid UTF-8", printable(text));
    }
}

void check_names(const std::vector<NamedTensor>& tensors) {
    std::set<std::string_view> seen;
    for (const auto& [name, tensor] : tensors) {
        require(static_cast<bool>(tensor), "safetensors", "tensor '{}' to be written is empty",
                printable(name));
        require(name != "__metadata__", "safetensors", "a tensor cannot be named '__metadata__'");
        require(seen.insert(name).second, "safetensors", "tensor '{}' to be written appears twice",
                printable(name));
    }
}

std::string header_of(const std::vector<const NamedTensor*>& tensors, const Metadata& metadata) {
    std::string header = "{", separator;
    if (!metadata.empty()) {
        header += "\"__metadata__\":{";
        for (const auto& [key, value] : metadata) {
            header += std::exchange(separator, ",") + json_string(key) + ":" + json_string(value);
        }
        header += "}";
    }
    size_t begin = 0;
    for (const NamedTensor* t : tensors) {
        const size_t end = begin + t->tensor.bytes();
        header += std::exchange(separator, ",");
        header +=
            fmt::format(R"({}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", json_string(t->name),
                        safetensors_name(t->tensor.dtype()), fmt::join(t->tensor.shape(), ","), begin, end);
        begin = end;
    }
    header += "}";
    header.resize((header.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');
    return header;
}

void write_data(AtomicFile& file, const Tensor& tensor) {
    if (tensor.size() == 0) return;
    if (tensor.dense()) {
        file.write(std::span<const std::byte>(tensor.raw(), tensor.bytes()));
        return;
    }
    // A strided slice: its rows gathered in a small buffer.
    const size_t rows = static_cast<size_t>(tensor.dim(0)), row = tensor.bytes() / rows;
    const size_t stride = static_cast<size_t>(tensor.stride()) * size_of(tensor.dtype());
    const size_t at_once = std::max<size_t>(1, kBuffer / row);
    std::vector<std::byte> buffer(std::min(at_once, rows) * row);
    for (size_t first = 0; first < rows; first += at_once) {
        const size_t count = std::min(at_once, rows - first);
        for (size_t i = 0; i < count; ++i) {
            std::memcpy(buffer.data() + i * row, tensor.raw() + (first + i) * stride, row);
        }
        file.write(std::span<const std::byte>(buffer.data(), count * row));
    }
}

}  // namespace

void write_safetensors(const std::filesystem::path& path, const std::vector<NamedTensor>& tensors,
                       const Metadata& metadata) {
    check_names(tensors);
    std::vector<const NamedTensor*> order;
    for (const NamedTensor& t : tensors) order.push_back(&t);
    std::sort(order.begin(), order.end(), [](const NamedTensor* a, const NamedTensor* b) {
        const int ra = safetensors_rank(a->tensor.dtype()), rb = safetensors_rank(b->tensor.dtype());
        return ra != rb ? ra > rb : a->name < b->name;
    });
    const std::string header = header_of(order, metadata);
    std::byte length[sizeof(uint64_t)];
    for (size_t i = 0; i < sizeof length; ++i) length[i] = static_cast<std::byte>(header.size() >> (8 * i));
    AtomicFile file(path);
    file.write(std::span<const std::byte>(length));
    file.write(header);
    for (const NamedTensor* t : order) write_data(file, t->tensor);
    file.commit();
}

}  // namespace ssm
