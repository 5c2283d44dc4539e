#include "ssm/tasks/task.h"

#include <string>

#include "ssm/core/error.h"
#include "ssm/tasks/induction_heads/induction_heads.h"
#include "ssm/tasks/selective_copying/selective_copying.h"

namespace ssm {

std::span<const Task> tasks() {
    static const Task kTasks[] = {
        induction_heads::task(),
        selective_copying::task(),
    };
    return kTasks;
}

const Task& find_task(std::string_view name) {
    std::string known;
    for (const Task& t : tasks()) {
        if (t.name == name) return t;
        known += fmt::format("{}{}", known.empty() ? "" : ", ", t.name);
    }
    fail(ErrorCode::invalid_argument, "task", "unknown task '{}'; known: {}", name, known);
}

}  // namespace ssm
