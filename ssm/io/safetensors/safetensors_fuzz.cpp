// Any bytes: either an Error of one line, or a file whose tensors lie inside the bytes and tile them.
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string_view>
#include <vector>

#include "ssm/core/error.h"
#include "ssm/io/safetensors/safetensors.h"

namespace {

void check(bool condition) {
    if (!condition) std::abort();
}

void read(std::span<const std::byte> bytes) {
    const auto file = ssm::SafetensorsFile::parse(bytes, "fuzz");
    size_t covered = 0;
    unsigned sum = 0;
    for (const ssm::TensorInfo& info : file.tensors()) {
        check(info.begin == covered);
        const ssm::Tensor t = file.tensor(info.name, info.shape);
        check(t.dtype() == info.dtype && t.bytes() == info.end - info.begin);
        check(reinterpret_cast<uintptr_t>(t.raw()) % ssm::size_of(t.dtype()) == 0);
        for (size_t i = 0; i < t.bytes(); ++i) sum += std::to_integer<unsigned>(t.raw()[i]);
        covered = info.end;
    }
    check(covered <= bytes.size() && sum <= 255 * covered);
}

// An exact copy at `shift` bytes past an aligned address: reads past its end are seen.
void attempt(std::span<const uint8_t> data, size_t shift) {
    std::vector<std::byte> bytes(data.size() + shift);
    for (size_t i = 0; i < data.size(); ++i) bytes[shift + i] = static_cast<std::byte>(data[i]);
    try {
        read(std::span<const std::byte>(bytes).subspan(shift));
    } catch (const ssm::Error& e) {
        const std::string_view message = e.what();
        check(message.starts_with("[safetensors] fuzz: ") && message.size() < 1000);
        check(message.find('\n') == std::string_view::npos);
        check(e.code() == ssm::ErrorCode::bad_file || e.code() == ssm::ErrorCode::unsupported);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    attempt({data, size}, 0);
    attempt({data, size}, 3);
    // Once more with a true header length, so that mutations reach what lies behind it.
    std::vector<uint8_t> repaired(data, data + size);
    size_t end = size;
    while (end > 8 && repaired[end - 1] != '}') --end;
    if (end <= 8) return 0;
    for (size_t i = 0; i < 8; ++i) repaired[i] = static_cast<uint8_t>((end - 8) >> (8 * i));
    attempt(repaired, 0);
    return 0;
}
