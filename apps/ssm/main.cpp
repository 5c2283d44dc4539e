// The command `ssm`. Results on stdout, progress on stderr; exit 0 ok, 1 failed, 2 usage.
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <string>

#include <fmt/format.h>

#include "apps/ssm/commands/bench.h"
#include "apps/ssm/commands/common.h"
#include "apps/ssm/commands/convert.h"
#include "apps/ssm/commands/doctor.h"
#include "apps/ssm/commands/eval.h"
#include "apps/ssm/commands/generate.h"
#include "apps/ssm/commands/inspect.h"
#include "apps/ssm/commands/task.h"
#include "apps/ssm/commands/tokenizer.h"
#include "apps/ssm/commands/train.h"
#include "apps/ssm/commands/verify.h"
#include "ssm/core/error.h"

namespace {

std::string one_line(std::string text) {
    std::ranges::replace(text, '\n', ' ');
    while (text.ends_with(' ')) text.pop_back();
    return text;
}

int report(std::string_view message) {
    std::fprintf(stderr, "ssm: %s\n", one_line(std::string(message)).c_str());
    return 1;
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app{
        "ssm.cpp: train, run, evaluate and inspect state space models (Mamba, Mamba-2, Falcon Mamba)."};
    app.require_subcommand(1);
    app.footer("ssm COMMAND --help lists a command's options. Exit: 0 ok, 1 failed, 2 usage.");
    app.set_version_flag("--version", std::string(SSM_VERSION));
    app.failure_message([](const CLI::App*, const CLI::Error& e) {
        return fmt::format("ssm: [usage] {}; --help says more\n", one_line(e.what()));
    });
    ssm::cli::add_generate(app);
    ssm::cli::add_eval(app);
    ssm::cli::add_verify(app);
    ssm::cli::add_train(app);
    ssm::cli::add_task(app);
    ssm::cli::add_tokenizer(app);
    ssm::cli::add_inspect(app);
    ssm::cli::add_convert(app);
    ssm::cli::add_bench(app);
    ssm::cli::add_doctor(app);
    ssm::cli::refuse_overflow(app);
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        const bool asked = e.get_exit_code() == 0;  // --help, --version
        return app.exit(e) == 0 && asked ? 0 : 2;
    } catch (const ssm::Error& e) {
        return report(e.what());
    } catch (const std::bad_alloc&) {
        return report("[memory] out of memory");
    } catch (const std::exception& e) {
        return report(fmt::format("[internal] {}", e.what()));
    }
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) return report("[stdout] cannot be written");
    return 0;
}
