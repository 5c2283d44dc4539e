// The weights of a model folder in the Hugging Face layout: model.safetensors, or shards named by
// model.safetensors.index.json. Every tensor must be claimed: a loader asks for what the model needs, then
// calls require_all_claimed(), so that a weight that nobody understood is an error and not a wrong model.
//
// Errors (bad_file, io): "[checkpoint] DIR: ...", naming the shard or the tensors.
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "ssm/io/safetensors/safetensors.h"

namespace ssm {

class Checkpoint {
public:
    static Checkpoint open(const std::filesystem::path& folder);

    std::vector<std::string> names() const;  // sorted
    bool contains(std::string_view name) const { return find(name) != nullptr; }
    const TensorInfo* find(std::string_view name) const;  // null when absent; claims nothing
    const Metadata& metadata() const { return files_.front().metadata(); }
    size_t bytes() const;  // of all tensors

    // The tensor (read-only memory, see SafetensorsFile), claimed. Throws when it is missing, or when its
    // shape is another than the one asked for.
    Tensor tensor(std::string_view name);
    Tensor tensor(std::string_view name, const Shape& shape);
    // Declares a tensor as understood though not needed (a buffer that is recomputed, say); absent is fine.
    void claim(std::string_view name);

    // Throws naming at most five tensors that were not claimed, and their number.
    void require_all_claimed() const;

private:
    std::string folder_;
    std::vector<SafetensorsFile> files_;
    std::map<std::string, size_t, std::less<>> file_of_;
    std::set<std::string, std::less<>> claimed_;
};

// Writes `tensors` into `folder` (made if absent) as model.safetensors or, when they have more than
// `max_shard_bytes`, in order as model-00001-of-0000N.safetensors with the index; weights of an earlier
// checkpoint there that would contradict them are removed last. Each file is atomic; for a folder that is
// atomic as a whole, write to a new one and rename it.
void write_checkpoint(const std::filesystem::path& folder, const std::vector<NamedTensor>& tensors,
                      size_t max_shard_bytes = size_t{5'000'000'000});

}  // namespace ssm
