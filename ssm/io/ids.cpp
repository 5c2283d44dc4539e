#include "ssm/io/ids.h"

#include "ssm/core/error.h"
#include "ssm/io/mapped_file.h"
#include "ssm/io/printable.h"

namespace ssm {

IdType id_type_from_name(std::string_view name) {
    if (name == "uint16" || name == "u16") return IdType::u16;
    if (name == "uint32" || name == "u32") return IdType::u32;
    fail(ErrorCode::invalid_argument, "ids", "type must be uint16 or uint32 but is '{}'", printable(name));
}

std::vector<int32_t> read_ids(const std::filesystem::path& path, IdType type) {
    const auto file = MappedFile::open(path);
    const auto bytes = file->bytes();
    const size_t width = type == IdType::u16 ? 2 : 4;
    const auto name = [&] { return printable(path.string(), 400); };
    if (bytes.size() % width != 0) {
        fail(ErrorCode::bad_file, "ids", "{}: {} bytes are no whole number of uint{}", name(), bytes.size(),
             8 * width);
    }
    std::vector<int32_t> ids(bytes.size() / width);
    for (size_t i = 0; i < ids.size(); ++i) {
        uint32_t id = 0;
        for (size_t k = 0; k < width; ++k) id |= std::to_integer<uint32_t>(bytes[i * width + k]) << (8 * k);
        if (id > 0x7fffffffu) {
            fail(ErrorCode::bad_file, "ids", "{}: id {} at place {} is past 2^31 - 1", name(), id, i);
        }
        ids[i] = static_cast<int32_t>(id);
    }
    return ids;
}

}  // namespace ssm
