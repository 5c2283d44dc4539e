#include "apps/ssm/commands/common.h"

#include <charconv>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>

#include "ssm/io/zstd_reader.h"

namespace ssm::cli {
namespace {

template <class Holds>
CLI::Validator number(const char* type, const char* what, Holds holds) {
    return CLI::Validator(
        [=](const std::string& text) {
            double value = 0;
            const bool is_number = CLI::detail::lexical_cast(text, value);
            return is_number && holds(value) ? std::string()
                                             : fmt::format("must be {} but is {}", what, text);
        },
        type);
}

}  // namespace

const CLI::Validator kPositive = number("POSITIVE", "greater than 0", [](double x) { return x > 0; }),
                     kNotNegative = number("NONNEGATIVE", "0 or greater", [](double x) { return x >= 0; }),
                     kBelowOne = number("[0, 1)", "in [0, 1)", [](double x) { return x >= 0 && x < 1; });

void refuse_overflow(CLI::App& command) {
    // CLI11 2.1 takes the nearest number instead, and -1 of an unsigned option for the largest.
    const auto fits = []<class T>(T) {
        return CLI::Validator(
            [](const std::string& text) {
                T value = 0;
                const char* end = text.data() + text.size();
                const auto [rest, error] = std::from_chars(text.data(), end, value);
                return error == std::errc() && rest == end
                           ? std::string()
                           : fmt::format("must be a whole number in [{}, {}] but is {}",
                                         std::numeric_limits<T>::min(), std::numeric_limits<T>::max(), text);
            },
            "");
    };
    for (CLI::Option* option : command.get_options()) {
        const std::string type = option->get_type_name();  // "INT:POSITIVE"
        if (type.starts_with("INT")) option->check(fits(int64_t{}));
        if (type.starts_with("UINT")) option->check(fits(uint64_t{}));
    }
    for (CLI::App* below : command.get_subcommands(nullptr)) refuse_overflow(*below);
}

void RunOptions::add_to(CLI::App& command) {
    command.add_option("--device", device, "Where to compute")
        ->check(CLI::IsMember({"cpu", "cuda"}))
        ->capture_default_str();
    command.add_option("--dtype", dtype, "Type of weights and activations")
        ->check(CLI::IsMember({"f32", "bf16"}))
        ->capture_default_str();
    command.add_option("--threads", threads, "Threads; 0: all cores")
        ->check(CLI::Range(0, 1024))
        ->capture_default_str();
    command.add_flag("--json", json, "Print the result as one JSON value");
}

void StateOptions::add_to(CLI::App& command) {
    command
        .add_option("--state-dtype", dtype,
                    "Of the states while writing; bf16 (cuda): half the memory, faster, less exact")
        ->check(CLI::IsMember({"f32", "bf16"}))
        ->capture_default_str();
}

Exec RunOptions::exec() const {
    if (device == "cuda") return make_cuda_exec();
    return make_cpu_exec(threads);
}

void add_recompute(CLI::App& command, std::string& value) {
    // A check does not see that there is no value.
    const CLI::callback_t set = [&value](const CLI::results_t& given) {
        value = given.empty() || given[0].empty() ? "layers" : given[0];
        return true;
    };
    command
        .add_option(
            "--recompute", set,
            "What a training step on a GPU computes again in its backward pass, for less memory: cheap "
            "(the default there) what costs little, layers (also without a value) nearly all; none is "
            "fastest")
        ->type_name("KIND")
        ->check(CLI::IsMember({"none", "cheap", "layers"}))
        ->expected(0, 1);
}

Recompute recompute_of(const std::string& value, Device device) {
    if (device == Device::cpu) {
        require(value.empty() || value == "none", "train", "--recompute is for --device cuda");
        return Recompute::none;
    }
    if (value == "none") return Recompute::none;
    return value == "layers" ? Recompute::layers : Recompute::cheap;
}

std::filesystem::path shipped_model() {
    namespace fs = std::filesystem;
    constexpr const char* kName = "models/stories";
    std::error_code error;
    const fs::path program = fs::read_symlink("/proc/self/exe", error);
    std::vector<fs::path> roots;
    if (!error) {
        fs::path dir = program.parent_path();
        roots.push_back(dir.parent_path() / "share" / "ssm");
        for (int up = 0; up < 5 && dir.has_relative_path(); ++up, dir = dir.parent_path())
            roots.push_back(dir);
    }
    roots.push_back(fs::current_path(error));
    for (const fs::path& root : roots) {
        if (fs::exists(root / kName / "config.json", error)) return root / kName;
    }
    fail(ErrorCode::io, "model", "the shipped model '{}' was not found; give --model DIR", kName);
}

std::vector<int32_t> parse_ids(const std::string& text) {
    std::vector<int32_t> ids;
    const char *p = text.data(), *end = p + text.size();
    while (p != end) {
        if (*p == ' ' || *p == ',' || *p == '\t' || *p == '\n') {
            ++p;
            continue;
        }
        int32_t id = 0;
        const auto [next, error] = std::from_chars(p, end, id);
        if (error != std::errc() ||
            (next != end && std::string_view(" ,\t\n").find(*next) == std::string::npos)) {
            const std::string_view rest(p, static_cast<size_t>(end - p));
            fail(ErrorCode::invalid_argument, "ids", "'{}' is not a token id",
                 rest.substr(0, std::min<size_t>(rest.find_first_of(" ,\t\n"), 24)));
        }
        ids.push_back(id);
        p = next;
    }
    return ids;
}

void print_json(const nlohmann::ordered_json& object) {
    std::cout << object.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) << std::endl;
}

std::string read_text(const std::string& path) {
    if (path == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
    return read_whole_text(path);
}

}  // namespace ssm::cli
