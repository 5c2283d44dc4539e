#include "ssm/io/safetensors/checkpoint.h"

#include <algorithm>
#include <utility>

#include "ssm/core/error.h"
#include "ssm/io/atomic_file.h"
#include "ssm/io/json/json.h"
#include "ssm/io/mapped_file.h"
#include "ssm/io/printable.h"

namespace ssm {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kSingle = "model.safetensors", kIndex = "model.safetensors.index.json";

[[noreturn]] void fail_index(std::string_view what) {
    fail(ErrorCode::bad_file, "checkpoint", "{}: {}", kIndex, what);
}

// Name of each tensor -> name of its shard.
std::map<std::string, std::string> read_index(const fs::path& path) {
    const auto root = parse_json(read_text_file(path), "checkpoint", {.name = kIndex});
    const auto map = root.is_object() ? root.find("weight_map") : root.end();
    if (map == root.end() || !map->is_object()) fail_index("has no object 'weight_map'");
    std::map<std::string, std::string> shard_of;
    for (const auto& [tensor, shard] : map->items()) {
        if (!shard.is_string())
            fail_index(fmt::format("shard of tensor '{}' is not a string", printable(tensor)));
        const auto& name = shard.get_ref<const std::string&>();
        const bool plain = !name.empty() && name != "." && name.find("..") == std::string::npos &&
                           name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
        if (!plain) {
            fail_index(fmt::format("shard name '{}' of tensor '{}' is not a plain file name", printable(name),
                                   printable(tensor)));
        }
        shard_of.emplace(tensor, name);
    }
    if (shard_of.empty()) fail_index("'weight_map' is empty");
    return shard_of;
}

bool is_shard_name(const std::string& name) {
    // model-00001-of-00002.safetensors
    return name.size() == 32 && name.starts_with("model-") && name.compare(11, 4, "-of-") == 0 &&
           name.ends_with(".safetensors");
}

// Removes weight files of an earlier checkpoint that are not among `keep`.
void remove_others(const fs::path& folder, const std::set<std::string>& keep) {
    std::vector<fs::path> stale;
    for (const auto& entry : fs::directory_iterator(folder)) {
        const std::string name = entry.path().filename().string();
        const bool ours = name == kSingle || name == kIndex || is_shard_name(name);
        if (ours && !keep.contains(name)) stale.push_back(entry.path());
    }
    // The index goes before the shards that it names.
    std::sort(stale.begin(), stale.end(), [](const fs::path& a, const fs::path& b) {
        return (a.filename() == kIndex) > (b.filename() == kIndex);
    });
    for (const auto& path : stale) fs::remove(path);
}

std::vector<std::vector<NamedTensor>> split(const std::vector<NamedTensor>& tensors, size_t max_bytes) {
    std::vector<std::vector<NamedTensor>> shards(1);
    size_t used = 0;
    for (const NamedTensor& t : tensors) {
        const size_t bytes = t.tensor.bytes();
        if (!shards.back().empty() && (bytes > max_bytes || used > max_bytes - bytes)) {
            shards.emplace_back();
            used = 0;
        }
        shards.back().push_back(t);
        used += bytes;
    }
    return shards;
}

}  // namespace

Checkpoint Checkpoint::open(const fs::path& folder) {
    Checkpoint result;
    result.folder_ = printable(folder.string(), 400);
    std::error_code ignored;
    if (!fs::is_directory(folder, ignored)) {
        fail(ErrorCode::io, "checkpoint", "{}: is not a folder", result.folder_);
    }
    if (fs::exists(folder / kSingle, ignored)) {
        result.files_.push_back(SafetensorsFile::open(folder / kSingle));
        for (const TensorInfo& t : result.files_[0].tensors()) result.file_of_.emplace(t.name, 0);
        return result;
    }
    if (!fs::exists(folder / kIndex, ignored)) {
        fail(ErrorCode::io, "checkpoint", "{}: has neither {} nor {}", result.folder_, kSingle, kIndex);
    }
    const auto shard_of = read_index(folder / kIndex);
    std::map<std::string, size_t> number;
    for (const auto& [tensor, shard] : shard_of) {
        const auto [at, is_new] = number.emplace(shard, result.files_.size());
        if (is_new) {
            if (!fs::exists(folder / shard, ignored)) {
                fail(ErrorCode::io, "checkpoint", "{}: shard '{}' is missing", result.folder_,
                     printable(shard));
            }
            result.files_.push_back(SafetensorsFile::open(folder / shard));
        }
        if (!result.files_[at->second].contains(tensor)) {
            fail_index(
                fmt::format("tensor '{}' is not in its shard '{}'", printable(tensor), printable(shard)));
        }
        result.file_of_.emplace(tensor, at->second);
    }
    for (const SafetensorsFile& file : result.files_) {
        for (const TensorInfo& t : file.tensors()) {
            const auto at = shard_of.find(t.name);
            if (at == shard_of.end() || &result.files_[number.at(at->second)] != &file) {
                fail_index(fmt::format("shard '{}' holds tensor '{}', which the index does not place there",
                                       fs::path(file.name()).filename().string(), printable(t.name)));
            }
        }
    }
    return result;
}

std::vector<std::string> Checkpoint::names() const {
    std::vector<std::string> names;
    for (const auto& [name, file] : file_of_) names.push_back(name);
    return names;
}

const TensorInfo* Checkpoint::find(std::string_view name) const {
    const auto at = file_of_.find(name);
    return at == file_of_.end() ? nullptr : files_[at->second].find(name);
}

size_t Checkpoint::bytes() const {
    size_t sum = 0;
    for (const SafetensorsFile& file : files_) {
        for (const TensorInfo& t : file.tensors()) sum += t.end - t.begin;
    }
    return sum;
}

void Checkpoint::claim(std::string_view name) {
    if (contains(name)) claimed_.emplace(name);
}

Tensor Checkpoint::tensor(std::string_view name) {
    const auto at = file_of_.find(name);
    if (at == file_of_.end()) {
        fail(ErrorCode::bad_file, "checkpoint", "{}: tensor '{}' is missing", folder_, printable(name));
    }
    claim(name);
    return files_[at->second].tensor(name);
}

Tensor Checkpoint::tensor(std::string_view name, const Shape& shape) {
    const TensorInfo* info = find(name);
    if (info != nullptr && info->shape != shape) {
        fail(ErrorCode::bad_file, "checkpoint", "{}: tensor '{}' must be {} but is {}", folder_,
             printable(name), to_string(shape), to_string(info->shape));
    }
    return tensor(name);
}

void Checkpoint::require_all_claimed() const {
    constexpr size_t kNamed = 5;
    std::string list;
    size_t left = 0;
    for (const auto& [name, file] : file_of_) {
        if (claimed_.contains(name)) continue;
        if (left++ < kNamed) list += fmt::format("{}'{}'", list.empty() ? "" : ", ", printable(name));
    }
    if (left == 0) return;
    if (left > kNamed) list += fmt::format(" and {} more", left - kNamed);
    fail(ErrorCode::bad_file, "checkpoint", "{}: {} tensor{} that this model does not have: {}", folder_,
         left, left == 1 ? "" : "s", list);
}

void write_checkpoint(const fs::path& folder, const std::vector<NamedTensor>& tensors,
                      size_t max_shard_bytes) {
    std::error_code error;
    fs::create_directories(folder, error);
    if (error) {
        fail(ErrorCode::io, "checkpoint", "{}: cannot be made: {}", printable(folder.string(), 400),
             error.message());
    }
    const auto shards = split(tensors, max_shard_bytes);
    if (shards.size() == 1) {
        write_safetensors(folder / kSingle, tensors);
        remove_others(folder, {std::string(kSingle)});
        return;
    }
    require(shards.size() < 100'000, "checkpoint", "{} shards are more than a name has digits for",
            shards.size());
    std::set<std::string> files{std::string(kIndex)};
    nlohmann::json weight_map = nlohmann::json::object();
    size_t total_bytes = 0;
    int64_t total_elements = 0;
    for (size_t i = 0; i < shards.size(); ++i) {
        const std::string name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
        for (const NamedTensor& t : shards[i]) {
            require(weight_map.emplace(t.name, name).second, "safetensors",
                    "tensor '{}' to be written appears twice", printable(t.name));
            total_bytes += t.tensor.bytes();
            total_elements += t.tensor.size();
        }
        write_safetensors(folder / name, shards[i]);
        files.insert(name);
    }
    const nlohmann::json index = {
        {"metadata", {{"total_parameters", total_elements}, {"total_size", total_bytes}}},
        {"weight_map", std::move(weight_map)}};
    write_file_atomic(folder / kIndex, index.dump(2) + "\n");
    remove_others(folder, files);
}

}  // namespace ssm
