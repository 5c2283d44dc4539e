#include "apps/ssm/commands/stop_on_signal.h"

#include <csignal>

namespace ssm::cli {
namespace {

std::atomic<bool> stop_requested{false};
static_assert(std::atomic<bool>::is_always_lock_free);

void request_stop(int number) {
    stop_requested.store(true);
    std::signal(number, SIG_DFL);
}

}  // namespace

const std::atomic<bool>& stop_on_signal() {
    std::signal(SIGINT, request_stop);
    std::signal(SIGTERM, request_stop);
    return stop_requested;
}

void end_on_signal() {
    std::signal(SIGINT, SIG_DFL);
    std::signal(SIGTERM, SIG_DFL);
}

}  // namespace ssm::cli
