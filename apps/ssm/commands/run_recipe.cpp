#include "apps/ssm/commands/run_recipe.h"

#include <nlohmann/json.hpp>

#include "apps/ssm/commands/common.h"
#include "ssm/core/error.h"
#include "ssm/io/atomic_file.h"
#include "ssm/io/mapped_file.h"

namespace ssm::cli {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

void apply_recipe(CLI::App& command, const fs::path& path) {
    const Json recipe = Json::parse(read_text_file(path), nullptr, false);
    if (!recipe.is_object()) fail(ErrorCode::bad_file, "recipe", "`{}` is not a JSON object", path.string());
    const auto text = [](const Json& v) { return v.is_string() ? v.get<std::string>() : v.dump(); };
    for (const auto& [key, value] : recipe.items()) {
        if (key == "comment") continue;
        CLI::Option* option = command.get_option_no_throw("--" + key);
        if (option == nullptr || key == "help" || key == "recipe" || key == "resume") {
            fail(ErrorCode::bad_file, "recipe", "`{}`: \"{}\" is not an option of a recipe", path.string(),
                 key);
        }
        if (value.is_object() || value.is_null()) {
            fail(ErrorCode::bad_file, "recipe", "`{}`: \"{}\" has no value: {}", path.string(), key,
                 value.dump());
        }
        if (option->count() > 0) continue;
        try {
            if (value.is_array()) {
                for (const Json& v : value) option->add_result(text(v));
            } else {
                option->add_result(text(value));
            }
            option->run_callback();
        } catch (const CLI::Error& e) {
            fail(ErrorCode::bad_file, "recipe", "`{}`: \"{}\": {}", path.string(), key, e.what());
        }
    }
}

void write_recipe(const CLI::App& command, const fs::path& path) {
    Json recipe = Json::object();
    for (const CLI::Option* option : command.get_options()) {
        const std::string name = option->get_single_name();
        if (option->count() == 0 || option->get_positional() || name == "help" || name == "recipe" ||
            name == "resume" || name == "out" || name == "json" || name == "quiet") {
            continue;
        }
        const auto values = option->results();
        recipe[name] = option->get_items_expected_max() > 1 ? Json(values) : Json(values.front());
    }
    write_file_atomic(path, recipe.dump(1) + '\n');
}

void add_loop_options(CLI::App& c, TrainOptions& t) {
    c.add_option("--warmup", t.schedule.warmup, "Steps to reach --lr")
        ->check(kNotNegative)
        ->capture_default_str();
    c.add_option("--weight-decay", t.optimizer.weight_decay, "Of matrices; vectors and A_log have none")
        ->check(kNotNegative)
        ->capture_default_str();
    c.add_option("--beta2", t.optimizer.beta2, "AdamW")->check(kBelowOne)->capture_default_str();
    c.add_option("--clip", t.optimizer.clip, "Largest norm of the gradients; 0: any")
        ->check(kNotNegative)
        ->capture_default_str();
    c.add_option("--checkpoint-every", t.checkpoint_every, "Steps; 0: only at the end")
        ->check(kNotNegative)
        ->capture_default_str();
    c.add_option("--keep", t.keep, "Checkpoints to keep")->check(kPositive)->capture_default_str();
    c.add_option("--log-every", t.log_every, "Steps between lines of metrics.jsonl")
        ->check(kPositive)
        ->capture_default_str();
}

}  // namespace ssm::cli
