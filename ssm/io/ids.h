// Files of token ids: raw little-endian integers, nothing else.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string_view>
#include <vector>

namespace ssm {

enum class IdType { u16, u32 };

// "uint16" or "uint32" (u16, u32 too); throws (invalid_argument) on anything else.
IdType id_type_from_name(std::string_view name);

// All ids of a file. Throws when its size is no multiple of the id's, or an id does not fit int32.
std::vector<int32_t> read_ids(const std::filesystem::path& path, IdType type);

}  // namespace ssm
