#include "apps/ssm/commands/verify.h"

#include <cstdio>
#include <memory>

#include "apps/ssm/commands/common.h"
#include "ssm/models/verify.h"

namespace ssm::cli {
namespace {

struct Options {
    RunOptions run;
    std::string dir;
    bool record = false;
};

void run(const Options& o) {
    VerifyOptions options{.dtype = o.run.type()};
    if (options.dtype == DType::bf16) options.logits_tolerance = 2e-2;
    const Exec ex = o.run.exec();
    if (o.record) return record_expectation(ex, o.dir, 0);
    const Verified verified = verify_model(ex, o.dir, options);
    if (o.run.json) {
        nlohmann::ordered_json list = nlohmann::ordered_json::array();
        for (const auto& q : verified.quantities) {
            list.push_back(
                {{"name", q.name}, {"error", q.error}, {"tolerance", q.tolerance}, {"ok", q.ok()}});
        }
        print_json({{"ok", verified.ok()}, {"quantities", list}});
    } else {
        for (const auto& q : verified.quantities) {
            std::printf("%-4s %-12.3g (at most %g)  %s\n", q.ok() ? "ok" : "FAIL", q.error, q.tolerance,
                        q.name.c_str());
        }
    }
    size_t failed = 0;
    for (const auto& q : verified.quantities) failed += q.ok() ? 0 : 1;
    std::fflush(stdout);
    if (failed > 0) {
        fail(ErrorCode::numeric, "verify", "{} of {} quantities are past the tolerance", failed,
             verified.quantities.size());
    }
}

}  // namespace

void add_verify(CLI::App& app) {
    auto o = std::make_shared<Options>();
    CLI::App* c =
        app.add_subcommand("verify", "Compare a checkpoint with the expected.safetensors beside it");
    c->add_option("dir", o->dir, "Model folder")->required();
    c->add_flag("--record", o->record, "Write expected.safetensors with what this program computes, instead");
    o->run.add_to(*c);
    c->callback([o] { run(*o); });
}

}  // namespace ssm::cli
