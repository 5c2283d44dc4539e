// Running the command `ssm` as a user does: a new process, its exit code, what it printed.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "tests/support/temp_folder.h"

namespace ssm::test {

struct ProgramResult {
    int exit_code = -1;  // 128 + number when a signal ended it
    std::string out, err;
    nlohmann::json json() const { return nlohmann::json::parse(out); }
};

// The program under test with these arguments; `input` is its stdin. One that hangs is ended after ten
// minutes.
inline ProgramResult run_ssm(const std::vector<std::string>& arguments, const std::string& input = "") {
    const TempFolder folder;
    folder.file("in", input);
    std::vector<std::string> all{SSM_PROGRAM};
    all.insert(all.end(), arguments.begin(), arguments.end());
    std::vector<char*> argv;
    for (std::string& argument : all) argv.push_back(argument.data());
    argv.push_back(nullptr);
    const std::string in = folder / "in", out = folder / "out", err = folder / "err";
    const pid_t child = fork();
    if (child == 0) {
        const auto redirect = [](const std::string& file, int flags, int to) {
            const int fd = open(file.c_str(), flags, 0600);
            if (fd < 0 || dup2(fd, to) < 0) _exit(126);
        };
        redirect(in, O_RDONLY, STDIN_FILENO);
        redirect(out, O_WRONLY | O_CREAT, STDOUT_FILENO);
        redirect(err, O_WRONLY | O_CREAT, STDERR_FILENO);
        alarm(600);
        execv(argv[0], argv.data());
        _exit(127);
    }
    int status = 0;
    waitpid(child, &status, 0);
    ProgramResult result;
    result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    result.out = read_file(out);
    result.err = read_file(err);
    return result;
}

// Success, with the output as one JSON value.
inline nlohmann::json json_of(const std::vector<std::string>& arguments) {
    const ProgramResult r = run_ssm(arguments);
    EXPECT_EQ(r.exit_code, 0) << r.err;
    try {
        return r.json();
    } catch (const nlohmann::json::exception& e) {
        ADD_FAILURE() << e.what() << "\n" << r.out;
        return nullptr;
    }
}

// Failure with exit code 1: one line "ssm: [where] what" on stderr, which is returned, and nothing on stdout.
inline std::string failure_of(const std::vector<std::string>& arguments, const std::string& input = "",
                              int exit_code = 1) {
    const ProgramResult r = run_ssm(arguments, input);
    EXPECT_EQ(r.exit_code, exit_code) << r.err;
    EXPECT_EQ(r.out, "");
    EXPECT_EQ(r.err.rfind("ssm: [", 0), 0u) << r.err;
    EXPECT_FALSE(r.err.empty() || r.err.find('\n') != r.err.size() - 1) << r.err;
    return r.err.substr(0, r.err.find('\n'));
}

}  // namespace ssm::test
