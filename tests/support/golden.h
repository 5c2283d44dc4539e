// Reads the f32 tensors of a golden safetensors file: an 8-byte little-endian header length, a JSON header,
// data. Independent of the library's own reader, so that an operator's test depends on the operator alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace ssm::test {

struct GoldenTensor {
    std::vector<int64_t> shape;
    std::vector<float> values;  // row-major
};

// Every tensor of the file by name. Throws std::runtime_error when the file is not what it should be.
inline std::map<std::string, GoldenTensor> read_golden(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    uint64_t header = 0;
    if (bytes.size() < 8) throw std::runtime_error(path.string() + ": cannot be read");
    std::memcpy(&header, bytes.data(), 8);
    if (header > bytes.size() - 8) throw std::runtime_error(path.string() + ": header too long");
    std::map<std::string, GoldenTensor> tensors;
    const nlohmann::json json = nlohmann::json::parse(bytes.substr(8, header));
    for (const auto& [name, entry] : json.items()) {
        if (name == "__metadata__") continue;
        if (entry.at("dtype") != "F32") throw std::runtime_error(name + ": not F32");
        const auto begin = entry.at("data_offsets").at(0).get<uint64_t>();
        const auto end = entry.at("data_offsets").at(1).get<uint64_t>();
        if (begin > end || end > bytes.size() - 8 - header) throw std::runtime_error(name + ": offsets");
        GoldenTensor& tensor = tensors[name];
        tensor.shape = entry.at("shape").get<std::vector<int64_t>>();
        tensor.values.resize((end - begin) / sizeof(float));
        std::memcpy(tensor.values.data(), bytes.data() + 8 + header + begin,
                    tensor.values.size() * sizeof(float));
    }
    return tensors;
}

}  // namespace ssm::test
