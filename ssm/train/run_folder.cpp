#include "ssm/train/run_folder.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "ssm/core/error.h"

namespace ssm {
namespace fs = std::filesystem;

namespace {

constexpr const char* kWriting = ".writing";
constexpr const char* kRemoving = ".removing";

void sync_path(const fs::path& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    const bool good = fd >= 0 && ::fsync(fd) == 0;
    const int reason = errno;
    if (fd >= 0) ::close(fd);
    if (!good) fail(ErrorCode::io, "train", "cannot sync `{}`: {}", path.string(), std::strerror(reason));
}

void rename_path(const fs::path& from, const fs::path& to) {
    std::error_code error;
    fs::rename(from, to, error);
    if (error) fail(ErrorCode::io, "train", "cannot write `{}`: {}", to.string(), error.message());
    sync_path(to.parent_path());
}

void create(const fs::path& folder) {
    std::error_code error;
    fs::create_directories(folder, error);
    if (error) fail(ErrorCode::io, "train", "cannot create `{}`: {}", folder.string(), error.message());
}

// Complete checkpoints by step.
std::vector<fs::path> complete(const fs::path& checkpoints) {
    std::vector<std::pair<int64_t, fs::path>> found;
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator(checkpoints, ignored)) {
        const std::string name = entry.path().filename().string();
        if (!name.starts_with("step-") || name.size() > 23 || name.size() == 5 ||
            name.find_first_not_of("0123456789", 5) != std::string::npos) {
            continue;
        }
        found.emplace_back(std::stoll(name.substr(5)), entry.path());
    }
    std::sort(found.begin(), found.end());
    std::vector<fs::path> paths;
    for (auto& [step, path] : found) paths.push_back(std::move(path));
    return paths;
}

// Puts a symbolic link in place of another or of nothing. A file system without links goes without.
void link(const fs::path& target, const fs::path& name) {
    std::error_code ignored;
    if (fs::exists(fs::symlink_status(name, ignored)) && !fs::is_symlink(name, ignored)) return;
    const fs::path fresh = name.string() + ".new";
    fs::remove(fresh, ignored);
    fs::create_symlink(target, fresh, ignored);
    fs::rename(fresh, name, ignored);
}

}  // namespace

RunFolder::RunFolder(fs::path out) : out_(std::move(out)), checkpoints_(out_ / "checkpoints") {
    create(checkpoints_);
    const fs::path lock = out_ / ".lock";
    lock_ = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (lock_ < 0) fail(ErrorCode::io, "train", "cannot write `{}`: {}", lock.string(), std::strerror(errno));
    if (::flock(lock_, LOCK_EX | LOCK_NB) != 0) {
        ::close(lock_);
        fail(ErrorCode::io, "train", "`{}` is in use by another run", out_.string());
    }
    std::error_code ignored;
    fs::remove_all(checkpoints_ / kWriting, ignored);
    fs::remove_all(checkpoints_ / kRemoving, ignored);
}

RunFolder::~RunFolder() { ::close(lock_); }

std::optional<fs::path> RunFolder::latest(const fs::path& out) {
    const auto all = complete(out / "checkpoints");
    if (all.empty()) return std::nullopt;
    return all.back();
}

fs::path RunFolder::write(int64_t step, const std::function<void(const fs::path&)>& fill) {
    const fs::path target = checkpoints_ / fmt::format("step-{:08}", step), writing = checkpoints_ / kWriting;
    if (!fs::exists(target)) {
        std::error_code ignored;
        fs::remove_all(writing, ignored);
        create(writing);
        fill(writing);
        for (const auto& entry : fs::directory_iterator(writing)) sync_path(entry.path());
        sync_path(writing);
        rename_path(writing, target);
    }
    link_newest(target);
    return target;
}

void RunFolder::prune(int64_t keep) {
    auto all = complete(checkpoints_);
    const auto count = static_cast<int64_t>(all.size()) - std::max<int64_t>(keep, 1);
    for (int64_t i = 0; i < count; ++i) {
        const fs::path removing = checkpoints_ / kRemoving;
        rename_path(all[static_cast<size_t>(i)], removing);
        std::error_code ignored;
        fs::remove_all(removing, ignored);
    }
}

void RunFolder::link_newest(const fs::path& checkpoint) const {
    link(fs::path("checkpoints") / checkpoint.filename(), out_ / "last");
    for (const auto& entry : fs::directory_iterator(checkpoint)) {
        const fs::path name = entry.path().filename();
        if (name == "optimizer.safetensors" || name == "trainer.json") continue;
        link(fs::path("last") / name, out_ / name);
    }
}

}  // namespace ssm
