// Ctrl-C ends a run after its step, with a checkpoint.
#pragma once

#include <atomic>

namespace ssm::cli {

// Becomes true at the first SIGINT or SIGTERM from now on; the second ends the program at once.
const std::atomic<bool>& stop_on_signal();
// For what follows a run and leaves nothing to save: every signal ends the program at once again.
void end_on_signal();

}  // namespace ssm::cli
