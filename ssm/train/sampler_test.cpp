// The sampler: its permutation is a bijection, every token is seen once an epoch, resuming is exact; the
// learning rate.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>

#include "ssm/train/sampler.h"
#include "ssm/train/schedule.h"
#include "ssm/train/test_files.h"
#include "tests/support/compare.h"

namespace ssm {
namespace {

using test::error_of;
using test::TempFolder;
using test::write_text;

TEST(Permutation, IsABijection) {
    for (const uint64_t n : {1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 1000, 4097, 100000}) {
        std::set<uint64_t> seen;
        const Permutation p(n, 7 * n);
        for (uint64_t i = 0; i < n; ++i) {
            const uint64_t image = p(i);
            ASSERT_LT(image, n);
            ASSERT_TRUE(seen.insert(image).second) << n << " at " << i;
        }
    }
}

TEST(Permutation, Shuffles) {
    // Fixed points of a random permutation: 1 on average; neighbours stay neighbours about twice.
    int fixed = 0, neighbours = 0, equal = 0;
    for (uint64_t key = 0; key < 100; ++key) {
        const Permutation p(1000, key), q(1000, key + 1);
        for (uint64_t i = 0; i < 1000; ++i) {
            fixed += p(i) == i;
            equal += p(i) == q(i);
            if (i > 0) neighbours += p(i) == p(i - 1) + 1 || p(i) + 1 == p(i - 1);
        }
    }
    EXPECT_NEAR(fixed, 100, 50);
    EXPECT_NEAR(equal, 100, 50);
    EXPECT_NEAR(neighbours, 200, 80);
}

// Files whose ids tell their position: an encoder that numbers every byte it sees.
class SamplerTest : public ::testing::Test {
protected:
    // `sizes` of the documents; ids run from `first`, the ends are 0.
    TokenFile file(const std::vector<int>& sizes, int first = 1) {
        std::string text;
        TextEncoder encoder;
        for (size_t d = 0; d < sizes.size(); ++d) {
            // A document is its first id in decimal, padded to its size by dots; single threaded.
            text += std::to_string(first) + ":" + std::to_string(sizes[d]) + "\n<|endoftext|>\n";
            first += sizes[d];
        }
        encoder.encode = [](std::string_view t, std::vector<int32_t>& ids) {
            const int begin = std::stoi(std::string(t));
            const int size = std::stoi(std::string(t.substr(t.find(':') + 1)));
            for (int i = 0; i < size; ++i) ids.push_back(begin + i);
        };
        encoder.end_of_document = 0;
        encoder.vocabulary = 1 << 20;
        return TokenFile::open(make_cpu_exec(1), write_text(dir_ / (std::to_string(first) + ".txt"), text),
                               dir_ / "cache", encoder);
    }
    TempFolder dir_;
};

// Every sequence is a stretch of its file: the target follows the input.
void expect_shifted(const Batch& b) {
    ASSERT_EQ(b.ids.size(), b.targets.size());
    ASSERT_EQ(b.cu_seqlens.front(), 0);
    ASSERT_EQ(b.cu_seqlens.back(), b.tokens());
    for (size_t s = 1; s < b.cu_seqlens.size(); ++s) {
        for (int64_t i = b.cu_seqlens[s - 1]; i + 1 < b.cu_seqlens[s]; ++i) {
            ASSERT_EQ(b.targets[i], b.ids[i + 1]);
        }
    }
}

TEST_F(SamplerTest, WindowsVisitEverythingOncePerPass) {
    const int length = 7;
    BatchSampler sampler({{file({50, 33, 8}, 1), 1.0}, {file({40}, 1000), 3.0}},
                         {.length = length, .batch = 3, .seed = 5});
    // 94 tokens to predict + 1 first: 13 windows of 7; 41: 5 windows, three times.
    ASSERT_EQ(sampler.epoch_size(), 13u + 15u);
    std::map<int32_t, int> seen;
    Batch b;
    while (sampler.state().epoch < 3) {  // 28 * 3 windows: whole batches of 3
        sampler.next(b);
        expect_shifted(b);
        ASSERT_EQ(b.cu_seqlens, (std::vector<int64_t>{0, 7, 14, 21}));
        for (int32_t id : b.targets) ++seen[id];
    }
    for (int32_t id = 1; id <= 88; ++id) EXPECT_EQ(seen[id], 3) << id;  // the 13th window ends at id 89
    for (int32_t id = 1000; id <= 1034; ++id) EXPECT_EQ(seen[id], 9) << id;
}

TEST_F(SamplerTest, LongFilesShiftTheirCutsFromPassToPass) {
    BatchSampler sampler({{file({999}), 1.0}}, {.length = 10, .batch = 1, .seed = 3});
    ASSERT_EQ(sampler.epoch_size(), 99u);
    std::set<int> phases;
    Batch b;
    for (uint64_t epoch = 0; epoch < 8; ++epoch) {
        std::set<int32_t> seen;
        int phase = -1;
        while (sampler.state().epoch == epoch) {
            sampler.next(b);
            const int p = b.targets.front() % 10;
            if (phase < 0) phase = p;
            EXPECT_EQ(p, phase) << "one pass, one offset";
            for (int32_t id : b.targets) EXPECT_TRUE(seen.insert(id).second) << "a token twice in a pass";
        }
        EXPECT_EQ(seen.size(), 990u);
        phases.insert(phase);
    }
    EXPECT_GT(phases.size(), 2u);
}

TEST_F(SamplerTest, HalfWeightSeesAnotherHalfEachEpoch) {
    BatchSampler sampler({{file({101}), 0.5}}, {.length = 10, .batch = 1, .seed = 3});  // 10 windows
    ASSERT_EQ(sampler.epoch_size(), 5u);
    std::set<int32_t> seen;
    Batch b;
    while (sampler.state().epoch < 2) {
        sampler.next(b);
        for (int32_t id : b.targets) EXPECT_TRUE(seen.insert(id).second);
    }
    EXPECT_EQ(seen.size(), 100u);
}

TEST_F(SamplerTest, PackedDocumentsStayApart) {
    const std::vector<int> sizes{3, 20, 7, 1, 16, 15, 40};
    BatchSampler sampler({{file(sizes), 1.0}}, {.length = 16, .batch = 2, .seed = 9, .packed = true});
    ASSERT_EQ(sampler.epoch_size(), 1u + 2 + 1 + 1 + 2 + 1 + 3);  // document and end, by 16
    std::set<int32_t> starts{0}, seen;
    int64_t ends = 0;
    Batch b;
    for (int i = 0; i < 200 && sampler.state().epoch == 0; ++i) {
        sampler.next(b);
        expect_shifted(b);
        EXPECT_LE(b.tokens(), 32);
        for (size_t s = 1; s < b.cu_seqlens.size(); ++s) {
            const int64_t begin = b.cu_seqlens[s - 1], end = b.cu_seqlens[s];
            EXPECT_LE(end - begin, 16);
            for (int64_t j = begin; j < end; ++j) {
                EXPECT_TRUE(b.targets[j] != 0 || j == end - 1) << "a sequence goes on after a document's end";
                EXPECT_TRUE(b.ids[j] != 0 || j == begin);
            }
        }
        if (sampler.state().epoch == 0) {
            for (int32_t id : b.targets) {
                ends += id == 0;
                EXPECT_TRUE(id == 0 || seen.insert(id).second);
            }
        }
    }
    EXPECT_GT(seen.size(), 60u);
    EXPECT_LE(ends, 7);
}

TEST_F(SamplerTest, ResumesExactly) {
    for (const bool packed : {false, true}) {
        const auto make = [&] {
            return BatchSampler({{file({50, 33, 8}, 1), 1.5}, {file({40, 90, 300}, 1000), 0.7}},
                                {.length = 7, .batch = 3, .seed = 11, .packed = packed});
        };
        BatchSampler a = make();
        Batch x, y;
        for (int i = 0; i < 60; ++i) {
            BatchSampler b = make();
            b.seek(a.state());
            a.next(x);
            b.next(y);
            ASSERT_EQ(x.ids, y.ids);
            ASSERT_EQ(x.targets, y.targets);
            ASSERT_EQ(x.cu_seqlens, y.cu_seqlens);
            ASSERT_EQ(a.state(), b.state());
        }
        EXPECT_GT(a.state().epoch, 1u);
    }
}

TEST_F(SamplerTest, SeedsAndEpochsDiffer) {
    const TokenFile f = file({2000});
    BatchSampler a({{f, 1.0}}, {.length = 10, .batch = 8, .seed = 1}),
        b({{f, 1.0}}, {.length = 10, .batch = 8, .seed = 2});
    Batch x, y, z;
    a.next(x);
    b.next(y);
    a.seek({1, 0});
    a.next(z);
    EXPECT_NE(x.targets, y.targets);
    EXPECT_NE(x.targets, z.targets);
}

TEST_F(SamplerTest, Errors) {
    EXPECT_EQ(error_of([&] {
                  BatchSampler({{file({3}), 1.0}}, {.length = 7});
              }),
              "[sampler] a file has 5 tokens, fewer than one window of 7");
    EXPECT_EQ(error_of([&] {
                  BatchSampler({{file({30}), 0.0}}, {.length = 7});
              }),
              "[sampler] weight 0 is not in (0, 1e6]");
    EXPECT_EQ(error_of([&] { BatchSampler({}, {.length = 7}); }), "[sampler] no training data");
    EXPECT_EQ(error_of([&] {
                  BatchSampler({{file({30}), 1.0}}, {.length = 7}).seek({0, 9});
              }),
              "[sampler] position 9 is not in an epoch of 4");
}

TEST_F(SamplerTest, SequentialWindowsCoverTheFilesInOrder) {
    const std::vector<WeightedFile> files{{file({20}, 1), 1.0}, {file({5}, 100), 1.0}};
    for (const int64_t most : {0, 24, 10, 1}) {
        SequentialWindows windows(files, 8, 2, most);
        std::vector<int32_t> targets, expected;
        Batch b;
        while (windows.next(b)) {
            expect_shifted(b);
            targets.insert(targets.end(), b.targets.begin(), b.targets.end());
        }
        for (int32_t i = 1; i <= 20; ++i) expected.push_back(i);
        expected.push_back(0);
        for (int32_t i = 100; i < 105; ++i) expected.push_back(i);
        expected.push_back(0);
        if (most > 0) expected.resize(static_cast<size_t>(most));
        EXPECT_EQ(targets, expected) << most;
    }
}

TEST(Schedule, WarmsUpThenFallsAlongACosine) {
    const Schedule s{.peak = 1.0, .floor = 0.1, .warmup = 10};
    const auto rate = [&](int64_t step) {
        return learning_rate(s, step, static_cast<double>(step) / 110, 10.0 / 110);
    };
    EXPECT_DOUBLE_EQ(rate(1), 0.1);
    EXPECT_DOUBLE_EQ(rate(5), 0.5);
    EXPECT_DOUBLE_EQ(rate(10), 1.0);
    EXPECT_NEAR(rate(35), 0.1 + 0.9 * 0.5 * (1 + std::sqrt(0.5)), 1e-12);
    EXPECT_NEAR(rate(60), 0.55, 1e-12);
    EXPECT_NEAR(rate(110), 0.1, 1e-12);
    EXPECT_NEAR(rate(500), 0.1, 1e-12);
    EXPECT_DOUBLE_EQ(learning_rate({.peak = 2, .floor = 0, .warmup = 0}, 1, 0, 0), 2.0);
}

}  // namespace
}  // namespace ssm
