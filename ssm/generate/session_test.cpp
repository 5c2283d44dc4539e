// Session and Generator: reading in any pieces is the same, a saved state goes on like the run it came from,
// and files that are no state of this model are refused in one line.
#include "ssm/generate/session.h"

#include <gtest/gtest.h>

#include "ssm/generate/generator.h"
#include "ssm/io/safetensors/safetensors.h"
#include "tests/support/model_case.h"
#include "tests/support/temp_folder.h"

namespace ssm::test {
namespace {

namespace fs = std::filesystem;

constexpr auto kMamba2 = ReferenceShape::Kind::mamba2;
const ReferenceShape kMambaShape{.vocab = 61}, kMamba2Shape{.kind = kMamba2, .vocab = 61, .n = 8};

std::vector<int32_t> generate_ids(Session& session, Sampler& sampler, const LanguageModel& model,
                                  int64_t count) {
    return generate(session, sampler, nullptr, model, {.max_tokens = count, .ignore_eos = true}, {}).ids;
}

TEST(Session, AnyPiecesGiveTheSameLogits) {
    for (const ReferenceShape& shape : {kMambaShape, kMamba2Shape}) {
        const ModelCase c(shape);
        const Exec ex = make_cpu_exec(1);
        // Longer than a prefill chunk, and not a multiple of it.
        const PackedTokens tokens({Session::kPrefillChunk + 77}, shape.vocab);
        const auto expected = c.reference.logits(tokens.ids);
        const std::vector<double> last(expected.end() - shape.vocab, expected.end());
        for (const size_t piece : {size_t{1}, size_t{100}, tokens.ids.size()}) {
            Session session(ex, *c.model);
            for (size_t i = 0; i < tokens.ids.size(); i += piece) {
                session.consume(std::span(tokens.ids).subspan(i, std::min(piece, tokens.ids.size() - i)));
            }
            session.consume({});  // nothing changes nothing
            EXPECT_EQ(session.history(), tokens.ids);
            const std::vector<float> logits(session.logits().begin(), session.logits().end());
            expect_close(logits, last, 1e-5, "last logits");
        }
    }
}

TEST(Session, StateDoesNotGrow) {
    const ModelCase c(kMambaShape);
    const Exec ex = make_cpu_exec(1);
    Session session(ex, *c.model);
    const size_t bytes = session.state_bytes();
    // Per layer: k-1 inputs and n states a channel, in f32.
    EXPECT_EQ(bytes, static_cast<size_t>(2 * 16 * (3 + 4)) * sizeof(float));
    session.consume(PackedTokens({300}, kMambaShape.vocab).ids);
    EXPECT_EQ(session.state_bytes(), bytes);
}

struct SaveCase {
    const char* name;
    ReferenceShape shape;
    SamplerOptions sampler;
    DType dtype = DType::f32;
};

// Greedy, and sampled with the random numbers and the repetition penalty's history carried over.
TEST(Session, SavedStateGoesOnLikeOneRun) {
    const SamplerOptions sampled{.temperature = 1.5f, .top_p = 0.98f, .repetition_penalty = 1.3f, .seed = 5};
    for (const SaveCase& s :
         {SaveCase{"greedy", kMambaShape, {.temperature = 0}}, SaveCase{"sampled", kMambaShape, sampled},
          SaveCase{"greedy penalised", kMamba2Shape, {.temperature = 0, .repetition_penalty = 1.8f}},
          SaveCase{"sampled", kMamba2Shape, sampled}, SaveCase{"bf16", kMamba2Shape, sampled, DType::bf16}}) {
        SCOPED_TRACE(s.name);
        const ModelCase c(s.shape, 3, s.dtype);
        const Exec ex = make_cpu_exec(1);
        const std::vector<int32_t> prompt{3, 1, 4, 1, 5, 9, 2, 6};
        Session whole(ex, *c.model);
        Sampler one(s.sampler);
        whole.consume(prompt);
        const auto expected = generate_ids(whole, one, *c.model, 40);

        const TempFolder folder;
        const fs::path file = folder / "state.safetensors";
        std::vector<int32_t> ids;
        {
            Session first(ex, *c.model);
            Sampler sampler(s.sampler);
            first.consume(prompt);
            ids = generate_ids(first, sampler, *c.model, 13);
            first.save(file, sampler);
        }
        Session second(ex, *c.model);
        Sampler sampler(s.sampler);
        second.consume(std::vector<int32_t>{7, 7});  // forgotten: load replaces everything
        second.load(file, sampler);
        EXPECT_EQ(second.history().size(), prompt.size() + 13);
        for (const int32_t id : generate_ids(second, sampler, *c.model, 27)) ids.push_back(id);
        EXPECT_EQ(ids, expected);
        EXPECT_EQ(second.history(), whole.history());
        // Not a constant continuation, which would prove little.
        EXPECT_GT(std::set<int32_t>(ids.begin(), ids.end()).size(), 2u);
    }
}

class StateFile : public testing::Test {
protected:
    StateFile() : case_(kMambaShape), ex_(make_cpu_exec(1)), file_(folder_ / "state") {
        Session session(ex_, *case_.model);
        session.consume(std::vector<int32_t>{1, 2, 3});
        session.save(file_, sampler_);
    }
    // What loading says, with the folder's name left out.
    std::string load_error(LanguageModel& model) {
        Session session(ex_, model);
        session.consume(std::vector<int32_t>{5});
        const std::vector<float> before(session.logits().begin(), session.logits().end());
        Sampler sampler(SamplerOptions{});
        std::string text = error_of([&] { session.load(file_, sampler); });
        // A refused file changes nothing.
        EXPECT_EQ(std::vector<float>(session.logits().begin(), session.logits().end()), before);
        EXPECT_EQ(session.history(), std::vector<int32_t>{5});
        EXPECT_EQ(text.find('\n'), std::string::npos) << text;
        const std::string folder = folder_.path().string() + "/";
        for (size_t at; (at = text.find(folder)) != std::string::npos;) text.erase(at, folder.size());
        return text;
    }
    std::string load_error() { return load_error(*case_.model); }
    // The file with its tensors or its metadata changed.
    void rewrite(const std::function<void(std::vector<NamedTensor>&, Metadata&)>& change) {
        std::vector<NamedTensor> tensors;
        Metadata metadata;
        {
            const auto saved = SafetensorsFile::open(file_);
            metadata = saved.metadata();
            for (const TensorInfo& t : saved.tensors())
                tensors.push_back({t.name, saved.tensor(t.name).clone()});
        }
        change(tensors, metadata);
        write_safetensors(file_, tensors, metadata);
    }

    ModelCase case_;
    Exec ex_;
    TempFolder folder_;
    fs::path file_;
    Sampler sampler_{SamplerOptions{}};
};

TEST_F(StateFile, OfAnotherModelIsRefused) {
    const std::string other = "[state] state was saved with another model or another dtype";
    EXPECT_EQ(load_error(*ModelCase(kMambaShape, 2).model), other);               // other weights
    EXPECT_EQ(load_error(*ModelCase(kMamba2Shape).model), other);                 // other architecture
    EXPECT_EQ(load_error(*ModelCase(kMambaShape, 1, DType::bf16).model), other);  // other type
}

TEST_F(StateFile, DamagedIsRefused) {
    const std::string bytes = read_file(file_);
    const auto write = [&](const std::string& content) {
        std::ofstream(file_, std::ios::binary | std::ios::trunc) << content;
    };
    for (const size_t length : {size_t{1}, size_t{7}, size_t{8}, size_t{100}, bytes.size() - 1}) {
        write(bytes.substr(0, length));
        EXPECT_EQ(load_error().rfind("[safetensors] state: ", 0), 0u) << load_error();
    }
    Random random(1);
    for (int i = 0; i < 50; ++i) {
        std::string noise(static_cast<size_t>(random.integer(1, 400)), '\0');
        for (char& b : noise) b = static_cast<char>(random.integer(0, 255));
        write(noise);
        EXPECT_EQ(load_error().rfind("[safetensors] state: ", 0), 0u) << load_error();
    }
    write("");
    EXPECT_NE(load_error(), "(no error)");
    fs::remove(file_);
    EXPECT_EQ(load_error(), "[file] state: does not exist");
}

TEST_F(StateFile, WrongContentIsRefused) {
    const std::string original = read_file(file_);
    const auto message = [&](const std::function<void(std::vector<NamedTensor>&, Metadata&)>& change) {
        std::ofstream(file_, std::ios::binary | std::ios::trunc) << original;
        rewrite(change);
        return load_error();
    };
    const auto tensor = [](std::vector<NamedTensor>& t, const std::string& name) -> Tensor& {
        return std::ranges::find(t, name, &NamedTensor::name)->tensor;
    };
    EXPECT_EQ(message([](auto&, auto& m) { m.erase("format"); }),
              "[state] state is not a saved state: 'format' is missing");
    EXPECT_EQ(message([](auto&, auto& m) { m["format"] = "ssm.cpp session 0"; }),
              "[state] state is not a saved state of this version (\"ssm.cpp session 1\")");
    EXPECT_EQ(message([](auto&, auto& m) { m["draws"] = "-1"; }),
              "[state] state: 'draws' is not a number: \"-1\"");
    EXPECT_EQ(message([](auto&, auto& m) { m["model"] = "x"; }),
              "[state] state: 'model' is not a number: \"x\"");
    EXPECT_EQ(message([](auto& t, auto&) { t.erase(t.begin()); }).rfind("[safetensors] state: tensor '", 0),
              0u);
    EXPECT_EQ(message([&](auto& t, auto&) {
                  tensor(t, "layers.1.ssm") = Tensor::zeros({1, 16, 5});
              }),
              "[state] state: 'layers.1.ssm' must be f32 [1, 16, 4] but is f32 [1, 16, 5]");
    EXPECT_EQ(message([&](auto& t, auto&) {
                  tensor(t, "layers.0.conv") = Tensor::zeros({1, 3, 16}, DType::bf16);
              }),
              "[state] state: 'layers.0.conv' must be f32 [1, 3, 16] but is bf16 [1, 3, 16]");
    EXPECT_EQ(message([&](auto& t, auto&) { tensor(t, "history").template data<int32_t>()[1] = 61; }),
              "[state] state: token id 61 is outside the vocabulary of 61");
    EXPECT_EQ(message([&](auto& t, auto&) {
                  tensor(t, "history") = Tensor::zeros({3, 1}, DType::i32);
              }),
              "[state] state: 'history' must be i32 [3] but is i32 [3, 1]");
}

TEST(Session, Errors) {
    const ModelCase c(kMambaShape);
    const Exec ex = make_cpu_exec(1);
    Session session(ex, *c.model);
    Sampler sampler(SamplerOptions{});
    const TempFolder folder;
    EXPECT_EQ(error_of([&] { session.logits(); }),
              "[generate] the prompt is empty: there is no token to continue from");
    EXPECT_EQ(error_of([&] { session.save(folder / "state", sampler); }),
              "[state] there is nothing to save: no token was read");
    session.consume(std::vector<int32_t>{1, 2});
    const std::vector<float> before(session.logits().begin(), session.logits().end());
    ModelState untouched = c.model->new_state(1);
    EXPECT_EQ(error_of([&] {
                  session.consume(std::vector<int32_t>{3, 61});
              }),
              "[model] token id 61 is outside the vocabulary of 61");
    EXPECT_EQ(error_of([&] {
                  session.consume(std::vector<int32_t>{3, -1});
              }),
              "[model] token id -1 is outside the vocabulary of 61");
    // The refused tokens left nothing behind, not even the valid one among them.
    session.consume({});
    EXPECT_EQ(std::vector<float>(session.logits().begin(), session.logits().end()), before);
    EXPECT_EQ(session.history(), (std::vector<int32_t>{1, 2}));
    session.consume(std::vector<int32_t>{9});
    Session fresh(ex, *c.model);
    fresh.consume(std::vector<int32_t>{1, 2});
    fresh.consume(std::vector<int32_t>{9});
    EXPECT_TRUE(std::ranges::equal(session.logits(), fresh.logits()));
    // A folder that is a file cannot be written to, whoever one is.
    folder.file("file", "x");
    EXPECT_EQ(error_of([&] { session.save(folder / "file/state", sampler); }).rfind("[file] ", 0), 0u);
}

}  // namespace
}  // namespace ssm::test
