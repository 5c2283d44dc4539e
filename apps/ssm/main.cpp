// The command `ssm`. Results on stdout, progress on stderr; exit 0 ok, 1 failed, 2 usage.
#include <CLI/CLI.hpp>

#include <cstdio>
#include <exception>
#include <new>

#include "apps/ssm/commands/bench.h"
#include "apps/ssm/commands/convert.h"
#include "apps/ssm/commands/eval.h"
#include "apps/ssm/commands/generate.h"
#include "apps/ssm/commands/inspect.h"
#include "apps/ssm/commands/verify.h"
#include "ssm/core/error.h"

int main(int argc, char** argv) {
    CLI::App app{
        "ssm.cpp: train, run, evaluate and inspect state space models (Mamba, Mamba-2, Falcon Mamba)."};
    app.require_subcommand(1);
    app.set_version_flag("--version", std::string(SSM_VERSION));
    app.failure_message(CLI::FailureMessage::simple);
    ssm::cli::add_generate(app);
    ssm::cli::add_eval(app);
    ssm::cli::add_verify(app);
    ssm::cli::add_inspect(app);
    ssm::cli::add_convert(app);
    ssm::cli::add_bench(app);
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        const bool asked = e.get_exit_code() == 0;  // --help, --version
        return app.exit(e) == 0 && asked ? 0 : 2;
    } catch (const ssm::Error& e) {
        std::fprintf(stderr, "ssm: %s\n", e.what());
        return 1;
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr, "ssm: [memory] out of memory\n");
        return 1;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "ssm: %s\n", e.what());
        return 1;
    }
    return 0;
}
