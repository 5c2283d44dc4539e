// Tasks on the GPU: the answers of the CPU, whatever the pieces; a model that learns, validated on the way by
// the weights that it has then.
#include <gtest/gtest.h>

#include "ssm/models/registry.h"
#include "ssm/tasks/evaluate_task.h"
#include "ssm/tasks/task_source.h"
#include "ssm/train/trained_language_model.h"
#include "ssm/train/trainer.h"
#include "tests/support/cuda.h"
#include "tests/support/temp_folder.h"

namespace ssm {
namespace {

using test::cuda_exec;

std::unique_ptr<LanguageModel> model_of(const char* architecture, double louder) {
    const NewModel shape{.vocab = 16, .e = 32, .layers = 2, .n = 16, .p = 16};
    auto model = build_model(find_architecture(architecture).new_config(shape), "config");
    model->initialise(1);
    model->visit([&](const std::string&, Parameter& p) {
        for (int64_t i = 0; i < p.value().size(); ++i)
            p.value().data<float>()[i] *= static_cast<float>(louder);
    });
    return model;
}

class TasksCudaOf : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Architectures, TasksCudaOf, ::testing::Values("mamba", "mamba2"));

TEST_P(TasksCudaOf, AnswersAreTheCpus) {
    const Exec host = make_cpu_exec();
    const auto here = model_of(GetParam(), 1.5), there = model_of(GetParam(), 1.5);
    there->move_to(cuda_exec());
    for (const Task& task : tasks()) {
        EvaluateTaskOptions o{.length = 300, .sequences = 40, .seed = 4};
        const TaskAccuracy want = evaluate_task(host, *here, task, o);
        for (const int64_t batch_tokens : {100, 300, 100000}) {
            o.batch_tokens = batch_tokens;
            const TaskAccuracy got = evaluate_task(cuda_exec(), *there, task, o);
            EXPECT_EQ(got.answers, want.answers);
            // A tie may fall to the other side.
            EXPECT_NEAR(static_cast<double>(got.right), static_cast<double>(want.right), 2);
            EXPECT_NEAR(got.nll, want.nll, 1e-3 * want.nll) << task.name;
        }
    }
}

// Validates several times between replayed steps: nothing may be left of older weights.
TEST(TasksCuda, LearnsAndValidatesWithItsNewWeights) {
    const test::TempFolder folder;
    const Task& task = find_task("induction-heads");
    const auto model = model_of("mamba", 1.0);
    TrainedLanguageModel trained(cuda_exec(), *model);
    const EvaluateTaskOptions valid{.length = 16, .sequences = 512, .split = TaskSplit::valid};
    TrainOptions o;
    o.out = folder.path() / "run";
    o.steps = 600;
    o.schedule = {.peak = 5e-3, .floor = 5e-3, .warmup = 0};
    o.optimizer = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0};
    o.valid_every = 150;
    o.checkpoint_every = 0;
    Trainer trainer(cuda_exec(), trained,
                    std::make_unique<TaskSource>(task, TaskSourceOptions{.length = 16, .batch = 16}),
                    std::make_unique<TaskValidator>(cuda_exec(), *model, task, valid), o, false, nullptr);
    const TrainSummary s = trainer.run();
    ASSERT_TRUE(s.valid.has_value());
    EXPECT_GT(s.valid->accuracy.value(), 0.9);
    const auto loaded = load_model(o.out, DType::f32);
    const Exec host = make_cpu_exec();
    const TaskAccuracy a = evaluate_task(host, *loaded, task, valid);
    EXPECT_NEAR(s.valid->accuracy.value(), a.accuracy(), 0.01);
    EXPECT_NEAR(s.valid->loss, a.mean_nll(), 0.02 * a.mean_nll() + 1e-4);
    // The same through Trainable::loss, as texts are validated.
    Batch batch;
    write_sequences(task, 0, TaskSplit::valid, 0, 512, 16, batch);
    EXPECT_NEAR(trained.loss(batch), a.mean_nll(), 0.02 * a.mean_nll() + 1e-4);
}

}  // namespace
}  // namespace ssm
