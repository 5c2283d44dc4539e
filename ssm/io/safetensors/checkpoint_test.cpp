#include "ssm/io/safetensors/checkpoint.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "tests/support/shared.h"
#include "tests/support/temp_folder.h"

namespace ssm {
namespace {

namespace fs = std::filesystem;
using test::error_of;
using test::read_file;
using test::TempFolder;

std::vector<NamedTensor> some_tensors(int count) {
    std::vector<NamedTensor> tensors;
    for (int i = 0; i < count; ++i) {
        const auto x = static_cast<float>(i);
        tensors.push_back({fmt::format("t{}", i), Tensor::from_floats({2, 2}, {x, x + 1, x + 2, x + 3})});
    }
    return tensors;
}

std::vector<std::string> file_names(const fs::path& folder) {
    std::vector<std::string> names;
    for (const auto& e : fs::directory_iterator(folder)) names.push_back(e.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
}

std::string open_error(const TempFolder& folder) {
    return error_of([&] { Checkpoint::open(folder.path()); });
}

TEST(Checkpoint, OneFile) {
    const TempFolder folder;
    write_checkpoint(folder / "new/model", some_tensors(3));
    EXPECT_EQ(file_names(folder / "new/model"), std::vector<std::string>{"model.safetensors"});
    Checkpoint c = Checkpoint::open(folder / "new/model");
    EXPECT_EQ(c.names(), (std::vector<std::string>{"t0", "t1", "t2"}));
    EXPECT_EQ(c.metadata(), (Metadata{{"format", "pt"}}));
    EXPECT_EQ(c.bytes(), 48u);
    EXPECT_EQ(c.tensor("t2", {2, 2}).data<float>()[3], 5.0f);
}

TEST(Checkpoint, Shards) {
    const TempFolder folder;
    write_checkpoint(folder.path(), some_tensors(5), 40);  // two tensors of 16 bytes a shard
    EXPECT_EQ(
        file_names(folder.path()),
        (std::vector<std::string>{"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                                  "model-00003-of-00003.safetensors", "model.safetensors.index.json"}));
    EXPECT_EQ(read_file(folder / "model.safetensors.index.json"), R"({
  "metadata": {
    "total_parameters": 20,
    "total_size": 80
  },
  "weight_map": {
    "t0": "model-00001-of-00003.safetensors",
    "t1": "model-00001-of-00003.safetensors",
    "t2": "model-00002-of-00003.safetensors",
    "t3": "model-00002-of-00003.safetensors",
    "t4": "model-00003-of-00003.safetensors"
  }
}
)");
    Checkpoint c = Checkpoint::open(folder.path());
    for (const auto& [name, tensor] : some_tensors(5)) {
        EXPECT_EQ(std::memcmp(c.tensor(name).raw(), tensor.raw(), tensor.bytes()), 0);
    }
    c.require_all_claimed();
    EXPECT_EQ(c.bytes(), 80u);
}

TEST(Checkpoint, WritingAgainLeavesNoStaleFiles) {
    const TempFolder folder;
    folder.file("config.json", "{}");
    folder.file("model-extra.safetensors", "mine");
    write_checkpoint(folder.path(), some_tensors(4), 16);
    EXPECT_EQ(file_names(folder.path()).size(), 4u + 1 + 2);
    write_checkpoint(folder.path(), some_tensors(3), 32);
    EXPECT_EQ(file_names(folder.path()),
              (std::vector<std::string>{"config.json", "model-00001-of-00002.safetensors",
                                        "model-00002-of-00002.safetensors", "model-extra.safetensors",
                                        "model.safetensors.index.json"}));
    write_checkpoint(folder.path(), some_tensors(2));
    EXPECT_EQ(file_names(folder.path()),
              (std::vector<std::string>{"config.json", "model-extra.safetensors", "model.safetensors"}));
    write_checkpoint(folder.path(), some_tensors(2), 1);  // smaller than any tensor: one each
    EXPECT_EQ(Checkpoint::open(folder.path()).names().size(), 2u);
    EXPECT_FALSE(fs::exists(folder / "model.safetensors")) << "it would hide the shards";
}

TEST(Checkpoint, Claims) {
    const TempFolder folder;
    write_checkpoint(folder.path(), some_tensors(7));
    Checkpoint c = Checkpoint::open(folder.path());
    const std::string where = "[checkpoint] " + folder.path().string() + ": ";
    EXPECT_EQ(error_of([&] { c.require_all_claimed(); }),
              where + "7 tensors that this model does not have: 't0', 't1', 't2', 't3', 't4' and 2 more");
    for (const char* name : {"t0", "t1", "t3", "t4"}) c.tensor(name);
    EXPECT_NE(c.find("t5"), nullptr);
    EXPECT_EQ(error_of([&] { c.require_all_claimed(); }),
              where + "3 tensors that this model does not have: 't2', 't5', 't6'");
    c.claim("t2");
    c.claim("t5");
    c.claim("absent");
    EXPECT_EQ(error_of([&] { c.require_all_claimed(); }),
              where + "1 tensor that this model does not have: 't6'");
    EXPECT_EQ(error_of([&] { c.tensor("absent"); }), where + "tensor 'absent' is missing");
    EXPECT_EQ(error_of([&] { c.tensor("t6", {4}); }), where + "tensor 't6' must be [4] but is [2, 2]");
    c.tensor("t6");
    c.require_all_claimed();
}

TEST(Checkpoint, ErrorsOfTheFolder) {
    const TempFolder folder;
    const std::string where = "[checkpoint] " + folder.path().string();
    EXPECT_EQ(error_of([&] { Checkpoint::open(folder / "none"); }), where + "/none: is not a folder");
    EXPECT_EQ(open_error(folder), where + ": has neither model.safetensors nor model.safetensors.index.json");
    folder.file("model.safetensors", "");
    EXPECT_EQ(open_error(folder), "[file] " + folder.path().string() + "/model.safetensors: is empty");
    folder.file("model.safetensors", "short");
    EXPECT_EQ(open_error(folder), "[safetensors] " + folder.path().string() +
                                      "/model.safetensors: truncated: 5 bytes, not even a header length");
    EXPECT_EQ(error_of([&] { write_checkpoint(folder / "model.safetensors", {}); }).substr(0, 12),
              "[checkpoint]");
}

TEST(Checkpoint, ErrorsOfTheIndex) {
    const TempFolder folder;
    const auto with_index = [&](std::string_view text) {
        folder.file("model.safetensors.index.json", text);
        return open_error(folder);
    };
    const std::string where = "[checkpoint] model.safetensors.index.json: ";
    EXPECT_EQ(with_index("{").substr(0, 75),
              (where + "not valid JSON at byte 1: syntax error").substr(0, 75));
    EXPECT_EQ(with_index("[]"), where + "has no object 'weight_map'");
    EXPECT_EQ(with_index("{}"), where + "has no object 'weight_map'");
    EXPECT_EQ(with_index(R"({"weight_map": []})"), where + "has no object 'weight_map'");
    EXPECT_EQ(with_index(R"({"weight_map": {}})"), where + "'weight_map' is empty");
    EXPECT_EQ(with_index(R"({"weight_map": {"a": 1}})"), where + "shard of tensor 'a' is not a string");
    EXPECT_EQ(with_index(R"({"weight_map": {"a": "x", "a": "y"}})"), where + "key 'a' appears twice");
    for (const std::string bad :
         {"", "/etc/passwd", "../m.safetensors", "d/m.safetensors", "..", ".", "d\\\\m"}) {
        const std::string error = with_index(R"({"weight_map": {"a": ")" + bad + "\"}}");
        EXPECT_NE(error.find("of tensor 'a' is not a plain file name"), std::string::npos)
            << bad << " " << error;
    }
    EXPECT_EQ(with_index(R"({"weight_map": {"a": "s.safetensors"}})"),
              "[checkpoint] " + folder.path().string() + ": shard 's.safetensors' is missing");
}

TEST(Checkpoint, ErrorsBetweenIndexAndShards) {
    const TempFolder folder;
    write_checkpoint(folder.path(), some_tensors(4), 32);
    const std::string index = read_file(folder / "model.safetensors.index.json");
    const auto replaced = [&](const std::string& from, const std::string& to) {
        std::string text = index;
        text.replace(text.find(from), from.size(), to);
        folder.file("model.safetensors.index.json", text);
        return open_error(folder);
    };
    const std::string where = "[checkpoint] model.safetensors.index.json: ";
    EXPECT_EQ(replaced("\"t1\": \"model-00001", "\"t1\": \"model-00002"),
              where + "tensor 't1' is not in its shard 'model-00002-of-00002.safetensors'");
    EXPECT_EQ(replaced("\"t3\"", "\"u3\""),
              where + "tensor 'u3' is not in its shard 'model-00002-of-00002.safetensors'");
    EXPECT_EQ(replaced("    \"t1\": \"model-00001-of-00002.safetensors\",\n", ""),
              where +
                  "shard 'model-00001-of-00002.safetensors' holds tensor 't1', which the index does not "
                  "place there");
    folder.file("model.safetensors.index.json", index);
    fs::remove(folder / "model-00002-of-00002.safetensors");
    EXPECT_EQ(open_error(folder), "[checkpoint] " + folder.path().string() +
                                      ": shard 'model-00002-of-00002.safetensors' is missing");
    folder.file("model-00002-of-00002.safetensors", "xx");
    EXPECT_EQ(open_error(folder),
              "[safetensors] " + folder.path().string() +
                  "/model-00002-of-00002.safetensors: truncated: 2 bytes, not even a header length");
}

TEST(Checkpoint, ReadsRealFolders) {
    const auto shared = test::shared_dir();
    if (shared.empty()) GTEST_SKIP() << "no shared folder";
    Checkpoint stories = Checkpoint::open(shared / "checkpoints/mamba-stories");
    EXPECT_EQ(stories.bytes(), 25'576'704u);
    EXPECT_EQ(stories.tensor("backbone.embeddings.weight", {8192, 384}).dtype(), DType::bf16);
    for (const auto& entry : fs::directory_iterator(shared / "fixtures/models")) {
        EXPECT_FALSE(Checkpoint::open(entry.path()).names().empty()) << entry.path();
    }
}

}  // namespace
}  // namespace ssm
