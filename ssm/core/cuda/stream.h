// What host code asks of a GPU's stream, without CUDA's headers: pinned memory, events, captured graphs.
// Declared in every build, defined in one with CUDA: callers ask `if constexpr (kHasCuda)` first.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "ssm/core/exec.h"

namespace ssm::cuda {

// Host memory that the device reads and writes by itself. Freed with the last copy.
std::shared_ptr<std::byte> pinned_memory(size_t bytes);

// Copies that do not wait; the host's side is pinned memory.
void copy_in_later(const Exec& ex, void* to, const void* from, size_t bytes);
void copy_out_later(const Exec& ex, void* to, const void* from, size_t bytes);

// A mark in ex's stream after all that was asked so far, and waiting until the stream has reached it.
class Event {
public:
    Event();
    ~Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    void record(const Exec& ex);
    void wait() const;  // not at all before the first record()

private:
    void* event_ = nullptr;
};

// The work that `ask` puts into ex's stream, captured instead of run. The memory that it took and gave back
// belongs to the graph.
class Graph {
public:
    Graph(const Exec& ex, const std::function<void()>& ask);
    ~Graph();
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    void launch() const;

private:
    Exec ex_;
    void* graph_ = nullptr;
    std::vector<Allocator::Block> memory_;
};

}  // namespace ssm::cuda
