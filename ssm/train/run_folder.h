// The folder of a training run.
//
//   OUT/checkpoints/step-00001000/   a whole checkpoint: model, optimizer.safetensors, trainer.json
//   OUT/last -> checkpoints/step-...   the newest
//   OUT/config.json -> last/...        the newest checkpoint's model files: OUT is a model folder
//   OUT/metrics.jsonl
//
// A checkpoint is written into checkpoints/.writing, every file synced, and then renamed: a folder named
// step-N is complete, whatever happened. Old ones are renamed before they are removed. A lock keeps a second
// run out; it goes with the process.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>

namespace ssm {

class RunFolder {
public:
    // Creates the folder if need be, locks it and removes what a killed run left. Throws Error (io) when it
    // cannot be created or written, or another run has it.
    explicit RunFolder(std::filesystem::path out);
    ~RunFolder();
    RunFolder(const RunFolder&) = delete;
    RunFolder& operator=(const RunFolder&) = delete;

    const std::filesystem::path& path() const { return out_; }
    // The newest complete checkpoint of a folder.
    static std::optional<std::filesystem::path> latest(const std::filesystem::path& out);

    // `fill` writes the files into the folder it is given. An existing checkpoint of this step stays.
    std::filesystem::path write(int64_t step, const std::function<void(const std::filesystem::path&)>& fill);
    // Removes all but the newest `keep` checkpoints.
    void prune(int64_t keep);

private:
    void link_newest(const std::filesystem::path& checkpoint) const;

    std::filesystem::path out_, checkpoints_;
    int lock_ = -1;
};

}  // namespace ssm
