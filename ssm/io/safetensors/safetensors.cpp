#include "ssm/io/safetensors/safetensors.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>

#include "ssm/core/error.h"
#include "ssm/io/json/json.h"
#include "ssm/io/mapped_file.h"
#include "ssm/io/printable.h"
#include "ssm/io/safetensors/dtype_names.h"

namespace ssm {
namespace {

constexpr size_t kMaxHeader = 100'000'000;
constexpr size_t kMaxRank = 32;

[[noreturn]] void fail_in(std::string_view file, std::string_view what) {
    fail(ErrorCode::bad_file, "safetensors", "{}: {}", file, what);
}

// Reads the header from nlohmann's events, without a document in between: what it holds is never larger than
// a small multiple of the header, whatever the header says.
class HeaderReader {
public:
    using json = nlohmann::json;
    HeaderReader(std::string_view file, std::vector<TensorInfo>& tensors, Metadata& metadata)
        : file_(file), tensors_(tensors), metadata_(metadata) {}

    bool null() { unexpected("null"); }
    bool boolean(bool) { unexpected("a boolean"); }
    bool number_integer(int64_t) { unexpected("a negative number"); }
    bool number_float(double, const std::string&) { unexpected("a fraction or a number past 2^64"); }
    bool binary(json::binary_t&) { unexpected("binary data"); }
    bool number_unsigned(uint64_t v) {
        if (list_ == nullptr) unexpected("a number");
        if (list_->size() == kMaxRank)
            fail_in(file_, fmt::format("{} has more than {} numbers", field(), kMaxRank));
        list_->push_back(v);
        return true;
    }
    bool string(std::string& v) {
        if (at_ == At::metadata) {
            if (!metadata_.emplace(field_, v).second) {
                fail_in(file_, fmt::format("metadata '{}' appears twice", printable(field_)));
            }
        } else if (at_ == At::tensor && field_ == "dtype") {
            set_dtype(v);
        } else {
            unexpected("a string");
        }
        return true;
    }
    bool start_object(size_t) {
        if (at_ == At::outside) {
            at_ = At::top;
        } else if (at_ == At::top && name_ == "__metadata__") {
            if (has_metadata_) fail_in(file_, "the header has '__metadata__' twice");
            has_metadata_ = true;
            at_ = At::metadata;
        } else if (at_ == At::top) {
            at_ = At::tensor;
            has_dtype_ = has_shape_ = has_offsets_ = false;
        } else {
            unexpected("an object");
        }
        return true;
    }
    bool key(std::string& k) {
        (at_ == At::top ? name_ : field_) = k;
        return true;
    }
    bool end_object() {
        if (at_ == At::tensor) finish_tensor();
        at_ = at_ == At::top ? At::outside : At::top;
        return true;
    }
    bool start_array(size_t) {
        if (at_ != At::tensor || list_ != nullptr) unexpected("a list");
        if (field_ == "shape") {
            claim(has_shape_);
            list_ = &shape_;
        } else if (field_ == "data_offsets") {
            claim(has_offsets_);
            list_ = &offsets_;
        } else {
            unexpected("a list");
        }
        list_->clear();
        return true;
    }
    bool end_array() {
        list_ = nullptr;
        return true;
    }
    bool parse_error(size_t position, const std::string&, const json::exception& error) {
        const size_t byte = sizeof(uint64_t) + std::max<size_t>(position, 1) - 1;
        fail_in(file_, "header is " + json_error_line({}, byte, error.what()));
    }

private:
    enum class At { outside, top, tensor, metadata };

    std::string tensor_name() const { return fmt::format("tensor '{}'", printable(name_)); }
    std::string field() const {
        if (at_ == At::outside) return "the header";
        if (at_ == At::top) return tensor_name();
        if (at_ == At::metadata) return fmt::format("metadata '{}'", printable(field_));
        return fmt::format("'{}' of {}", printable(field_), tensor_name());
    }
    [[noreturn]] void unexpected(std::string_view got) const {
        std::string_view want = "an object";
        if (at_ == At::metadata) want = "a string";
        if (at_ == At::tensor) {
            const bool known = field_ == "dtype" || field_ == "shape" || field_ == "data_offsets";
            if (!known) fail_in(file_, fmt::format("{} is not a field of this format", field()));
            want = field_ == "dtype" ? "a string" : "a list of integers >= 0";
        }
        fail_in(file_, fmt::format("{} must be {} but has {}", field(), want, got));
    }
    void claim(bool& has) const {
        if (std::exchange(has, true)) fail_in(file_, fmt::format("{} appears twice", field()));
    }
    void set_dtype(const std::string& v) {
        claim(has_dtype_);
        const auto known = dtype_from_safetensors(v);
        if (!known) {
            fail(ErrorCode::unsupported, "safetensors", "{}: {} has the unknown dtype '{}'", file_,
                 tensor_name(), printable(v, 20));
        }
        dtype_ = *known;
    }
    void finish_tensor() {
        const char* missing = !has_dtype_     ? "dtype"
                              : !has_shape_   ? "shape"
                              : !has_offsets_ ? "data_offsets"
                                              : nullptr;
        if (missing != nullptr) fail_in(file_, fmt::format("{} has no '{}'", tensor_name(), missing));
        if (offsets_.size() != 2) {
            fail_in(file_,
                    fmt::format("{} must have two data_offsets but has {}", tensor_name(), offsets_.size()));
        }
        const uint64_t bytes = checked_bytes();
        if (offsets_[1] < offsets_[0] || offsets_[1] - offsets_[0] != bytes) {
            fail_in(file_,
                    fmt::format("{} is {} {} = {} bytes but its data_offsets are [{}, {}]", tensor_name(),
                                safetensors_name(dtype_), fmt::format("[{}]", fmt::join(shape_, ", ")), bytes,
                                offsets_[0], offsets_[1]));
        }
        tensors_.push_back({name_, dtype_, Shape(shape_.begin(), shape_.end()), offsets_[0], offsets_[1]});
    }
    // The tensor's size; zeros among the dimensions do not hide an overflow of the others, so that strides
    // computed from the shape cannot overflow either.
    uint64_t checked_bytes() const {
        constexpr auto kLimit = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
        uint64_t product = size_of(dtype_);
        bool empty = false;
        for (const uint64_t d : shape_) {
            if (d == 0) {
                empty = true;
            } else if (product > kLimit / d) {
                fail_in(file_, fmt::format("{} has a shape that overflows: [{}]", tensor_name(),
                                           fmt::join(shape_, ", ")));
            } else {
                product *= d;
            }
        }
        return empty ? 0 : product;
    }

    std::string_view file_;
    std::vector<TensorInfo>& tensors_;
    Metadata& metadata_;
    At at_ = At::outside;
    std::string name_, field_;  // the keys at the top and one level below
    bool has_metadata_ = false, has_dtype_ = false, has_shape_ = false, has_offsets_ = false;
    DType dtype_ = DType::f32;
    std::vector<uint64_t> shape_, offsets_;
    std::vector<uint64_t>* list_ = nullptr;  // the one being read
};

// The header's JSON, cut out of the file.
std::string_view header_text(std::span<const std::byte> bytes, std::string_view file) {
    uint64_t length = 0;
    if (bytes.size() < sizeof length) {
        fail_in(file, fmt::format("truncated: {} bytes, not even a header length", bytes.size()));
    }
    for (size_t i = 0; i < sizeof length; ++i) length |= std::to_integer<uint64_t>(bytes[i]) << (8 * i);
    if (length > kMaxHeader) {
        fail_in(file, fmt::format("header of {} bytes is larger than the format's limit of {}", length,
                                  kMaxHeader));
    }
    if (length > bytes.size() - sizeof length) {
        fail_in(file, fmt::format("truncated: header of {} bytes in a file of {}", length, bytes.size()));
    }
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + sizeof length, length);
    if (!text.starts_with('{')) fail_in(file, "header does not start with '{'");
    return text;
}

// Sorts the tensors by place; then each must begin where the one before it ends, the last at the file's end.
void check_layout(std::vector<TensorInfo>& tensors, size_t data_bytes, std::string_view file) {
    std::sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
        return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
    });
    size_t end = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
        const TensorInfo& t = tensors[i];
        const auto name = [](const TensorInfo& x) { return printable(x.name); };
        if (t.begin < end) {
            fail_in(file, fmt::format("tensor '{}' at bytes {}..{} overlaps tensor '{}' at {}..{}", name(t),
                                      t.begin, t.end, name(tensors[i - 1]), tensors[i - 1].begin,
                                      tensors[i - 1].end));
        }
        if (t.begin > end) {
            fail_in(file, fmt::format("bytes {}..{}, before tensor '{}', belong to no tensor", end, t.begin,
                                      name(t)));
        }
        if (t.end > data_bytes) {
            fail_in(file, fmt::format("truncated: tensor '{}' ends at byte {} of {} bytes of data", name(t),
                                      t.end, data_bytes));
        }
        end = t.end;
    }
    if (end != data_bytes) {
        fail_in(file, fmt::format("the last {} bytes of the file belong to no tensor", data_bytes - end));
    }
}

}  // namespace

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
    auto file = MappedFile::open(path);
    const auto bytes = file->bytes();
    return parse(bytes, printable(path.string(), 400), std::move(file));
}

SafetensorsFile SafetensorsFile::parse(std::span<const std::byte> bytes, std::string name,
                                       std::shared_ptr<const void> keep_alive) {
    SafetensorsFile result;
    result.name_ = std::move(name);
    result.keep_alive_ = std::move(keep_alive);
    const std::string_view header = header_text(bytes, result.name_);
    result.data_ = bytes.subspan(sizeof(uint64_t) + header.size());
    HeaderReader reader(result.name_, result.tensors_, result.metadata_);
    nlohmann::json::sax_parse(header.data(), header.data() + header.size(), &reader);
    check_layout(result.tensors_, result.data_.size(), result.name_);
    for (size_t i = 0; i < result.tensors_.size(); ++i) {
        if (!result.index_.emplace(result.tensors_[i].name, i).second) {
            fail_in(result.name_,
                    fmt::format("tensor '{}' appears twice", printable(result.tensors_[i].name)));
        }
    }
    return result;
}

const TensorInfo* SafetensorsFile::find(std::string_view tensor) const {
    const auto at = index_.find(tensor);
    return at == index_.end() ? nullptr : &tensors_[at->second];
}

Tensor SafetensorsFile::tensor(std::string_view tensor) const {
    const TensorInfo* info = find(tensor);
    if (info == nullptr) fail_in(name_, fmt::format("tensor '{}' is missing", printable(tensor)));
    const std::byte* data = data_.data() + info->begin;
    if (reinterpret_cast<uintptr_t>(data) % size_of(info->dtype) != 0) {
        Tensor copy = Tensor::empty(info->shape, info->dtype);
        if (info->end > info->begin) std::memcpy(copy.raw(), data, info->end - info->begin);
        return copy;
    }
    return Tensor::wrap(const_cast<std::byte*>(data), info->shape, info->dtype,
                        std::const_pointer_cast<void>(keep_alive_));
}

Tensor SafetensorsFile::tensor(std::string_view tensor, const Shape& shape) const {
    const TensorInfo* info = find(tensor);
    if (info != nullptr && info->shape != shape) {
        fail_in(name_, fmt::format("tensor '{}' must be {} but is {}", printable(tensor), to_string(shape),
                                   to_string(info->shape)));
    }
    return this->tensor(tensor);
}

}  // namespace ssm
