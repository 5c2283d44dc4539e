// The corpus reader: documents of .txt and .jsonl, plain and compressed; the byte encoder; the token cache.
#include <gtest/gtest.h>
#include <zstd.h>

#include <chrono>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "ssm/train/documents.h"
#include "ssm/train/encoder.h"
#include "ssm/train/hash.h"
#include "ssm/train/test_files.h"
#include "ssm/train/token_file.h"
#include "tests/support/compare.h"

namespace ssm {
namespace {

using test::error_of;
using test::TempFolder;
using test::write_text;

std::vector<std::string> documents(const std::filesystem::path& path, DocumentOptions options = {}) {
    DocumentReader reader(path, std::move(options));
    std::vector<std::string> all;
    for (std::string d; reader.next(d);) all.push_back(d);
    return all;
}

std::string compressed(const std::string& text) {
    std::string out(ZSTD_compressBound(text.size()), '\0');
    out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
    return out;
}

// Random documents with line breaks, some longer than the reader's blocks.
std::vector<std::string> random_documents(int count, uint64_t seed) {
    test::Random random(seed);
    std::vector<std::string> all;
    for (int i = 0; i < count; ++i) {
        std::string d(1, 'x');
        const int64_t size = i == 1 ? 700'000 : random.integer(1, 300);
        while (static_cast<int64_t>(d.size()) < size) d += "ab\n c<|endoftext|>"[random.integer(0, 17)];
        d.append("\xc3\xa9");
        all.push_back(d);
    }
    return all;
}

std::string joined(const std::vector<std::string>& all) {
    std::string text;
    for (const auto& d : all) text += d + "\n<|endoftext|>\n";
    return text;
}

TEST(Documents, TextSplitsAtSeparatorLines) {
    TempFolder dir;
    using V = std::vector<std::string>;
    const auto read = [&](const std::string& text) { return documents(write_text(dir / "a.txt", text)); };
    EXPECT_EQ(read("one\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n"), (V{"one\ntwo", "three"}));
    EXPECT_EQ(read("one\n\n<|endoftext|>\nlast without end"), (V{"one\n", "last without end"}));
    EXPECT_EQ(read("one\r\n<|endoftext|>\r\ntwo\r\n"), (V{"one", "two"}));
    EXPECT_EQ(read("in <|endoftext|> a line\n<|endoftext|>"), (V{"in <|endoftext|> a line"}));
    EXPECT_EQ(read("<|endoftext|>\n\n<|endoftext|>\n"), V{});
    EXPECT_EQ(read(""), V{});
    EXPECT_EQ(documents(write_text(dir / "b.txt", "x\n---\ny\n"), {.separator = "---"}), (V{"x", "y"}));
}

TEST(Documents, CompressedEqualsPlain) {
    TempFolder dir;
    const auto all = random_documents(50, 1);
    const std::string text = joined(all);
    EXPECT_EQ(documents(write_text(dir / "a.txt", text)), all);
    EXPECT_EQ(documents(write_text(dir / "a.txt.zst", compressed(text))), all);
    const size_t half = text.size() / 2;
    const std::string frames = compressed(text.substr(0, half)) + compressed(text.substr(half));
    EXPECT_EQ(documents(write_text(dir / "b.txt.zst", frames)), all);
}

TEST(Documents, JsonLines) {
    TempFolder dir;
    const auto all = random_documents(20, 2);
    std::string text;
    for (const auto& d : all) text += nlohmann::json({{"id", 1}, {"text", d}}).dump() + "\r\n\n";
    EXPECT_EQ(documents(write_text(dir / "a.jsonl", text)), all);
    EXPECT_EQ(documents(write_text(dir / "a.jsonl.zst", compressed(text))), all);
    EXPECT_EQ(documents(write_text(dir / "b.jsonl", R"({"body": "hello"})"), {.field = "body"}),
              std::vector<std::string>{"hello"});
}

TEST(Documents, Errors) {
    TempFolder dir;
    const auto error = [&](const std::string& name, const std::string& content) {
        const auto path = write_text(dir / name, content);
        const std::string message = error_of([&] { documents(path); }), full = path.string();
        const size_t at = message.find(full);
        return at == std::string::npos
                   ? message
                   : fmt::format("{}F{}", message.substr(0, at), message.substr(at + full.size()));
    };
    EXPECT_EQ(error("a.pdf", ""), "[corpus] `F` must end in .txt or .jsonl, optionally followed by .zst");
    EXPECT_EQ(error("a.txt",
                    "good\n<|endoftext|>\nab\xff"
                    "c"),
              "[corpus] `F`: document 2 is not UTF-8 at its byte 2 (0xff)");
    EXPECT_EQ(error("b.txt", "overlong \xc0\x80"),
              "[corpus] `F`: document 1 is not UTF-8 at its byte 9 (0xc0)");
    EXPECT_EQ(error("a.jsonl", "{\"text\": \"x\"}\n{\"text\": 3}\n"),
              "[corpus] F:2: not a JSON object with a string \"text\"");
    EXPECT_EQ(error("b.jsonl", "{\"text\": \"x\"}\n{\"text\": \"cut"),
              "[corpus] F:2: not a JSON object with a string \"text\"");
    const std::string packed = compressed(joined(random_documents(40, 3)));
    EXPECT_EQ(error("a.txt.zst", packed.substr(0, packed.size() - 9)),
              "[zstd] F: truncated: the file ends inside a frame");
    EXPECT_EQ(error("b.txt.zst", "this is no zstd"), "[zstd] F: is not zstd data");
    EXPECT_EQ(error_of([&] { documents(dir / "none.txt"); }),
              fmt::format("[file] {}: does not exist", (dir / "none.txt").string()));
}

TEST(ByteEncoder, BytesAreIdsAndTheTokenizerSaysTheSame) {
    const TextEncoder e = byte_encoder();
    std::vector<int32_t> ids;
    e.encode("a\xc3\xa9\n", ids);
    EXPECT_EQ(ids, (std::vector<int32_t>{0x61, 0xc3, 0xa9, 0x0a}));
    EXPECT_EQ(e.vocabulary, 256);
    EXPECT_EQ(e.end_of_document, 255);
    const auto vocab = nlohmann::json::parse(e.tokenizer_json)["model"]["vocab"];
    EXPECT_EQ(vocab.size(), 256u);
    EXPECT_EQ(vocab["a"], 0x61);
    EXPECT_EQ(vocab["\xc4\xa0"], 0x20);  // U+0120 stands for the space
    EXPECT_EQ(vocab["\xc4\x8a"], 0x0a);  // U+010A for the line feed
    EXPECT_EQ(vocab["<|endoftext|>"], 255);
}

class Cache : public ::testing::Test {
protected:
    TokenFile open(bool* built, int threads = 1) {
        return TokenFile::open(make_cpu_exec(threads), source_, dir_ / "cache", encoder_, {}, built);
    }
    std::filesystem::path cache_file() {
        for (const auto& entry : std::filesystem::directory_iterator(dir_ / "cache")) return entry.path();
        return {};
    }
    TempFolder dir_;
    std::vector<std::string> documents_ = random_documents(60, 4);
    std::filesystem::path source_ = write_text(dir_ / "a.txt", joined(documents_));
    TextEncoder encoder_ = byte_encoder();
};

TEST_F(Cache, HoldsTheDocuments) {
    for (const int64_t vocabulary : {256, 70000}) {  // u16 and u32 ids
        encoder_.vocabulary = vocabulary;
        encoder_.fingerprint = static_cast<uint64_t>(vocabulary);
        bool built = false;
        const TokenFile f = open(&built, 2);
        EXPECT_TRUE(built);
        ASSERT_EQ(f.documents(), 60);
        int64_t at = 1, bytes = 0;
        for (int64_t d = 0; d < f.documents(); ++d) {
            ASSERT_EQ(f.offset(d), at);
            std::vector<int32_t> ids(documents_[d].size() + 2), expected{255};
            f.copy(at - 1, static_cast<int64_t>(ids.size()), ids.data());
            encoder_.encode(documents_[d], expected);
            expected.push_back(255);
            ASSERT_EQ(ids, expected) << d;
            at += static_cast<int64_t>(documents_[d].size()) + 1;
            bytes += static_cast<int64_t>(documents_[d].size());
        }
        EXPECT_EQ(f.offset(f.documents()), at);
        EXPECT_EQ(f.tokens(), at);
        EXPECT_EQ(f.text_bytes(), bytes);
    }
}

TEST_F(Cache, IsTakenWhenSoundAndRebuiltWhenNot) {
    bool built = false;
    const uint64_t hash = open(&built).content_hash();
    EXPECT_TRUE(built);
    const std::string good = test::read_file(cache_file());
    open(&built);
    EXPECT_FALSE(built) << "unchanged";

    using namespace std::chrono_literals;
    std::filesystem::last_write_time(source_, std::filesystem::last_write_time(source_) + 10s);
    open(&built);
    EXPECT_FALSE(built) << "touched, same content";

    for (const size_t at :
         {size_t{0}, good.size() / 2, good.size() - 95, good.size() - 40, good.size() - 1}) {
        std::string bad = good;
        bad[at] = static_cast<char>(bad[at] ^ 1);
        write_text(cache_file(), bad);
        EXPECT_EQ(open(&built).content_hash(), hash);
        EXPECT_TRUE(built) << "byte " << at << " changed";
    }
    for (const size_t size : {size_t{0}, size_t{7}, size_t{88}, good.size() - 8}) {
        write_text(cache_file(), good.substr(0, size));
        EXPECT_EQ(open(&built).content_hash(), hash);
        EXPECT_TRUE(built) << "cut to " << size;
    }
    // Same size, other content.
    documents_[0][0] = 'y';
    write_text(source_, joined(documents_));
    std::filesystem::last_write_time(source_, std::filesystem::last_write_time(source_) + 20s);
    EXPECT_NE(open(&built).content_hash(), hash);
    EXPECT_TRUE(built) << "another source";

    encoder_.fingerprint ^= 1;
    open(&built);
    EXPECT_TRUE(built) << "another encoder";
}

TEST_F(Cache, Errors) {
    const auto error = [&] {
        bool built;
        return error_of([&] { open(&built); });
    };
    const std::string name = source_.string();
    write_text(source_, "\n<|endoftext|>\n");
    EXPECT_EQ(error(), fmt::format("[corpus] `{}` has no documents", name));
    EXPECT_TRUE(std::filesystem::is_empty(dir_ / "cache")) << "nothing half-written stays";
    std::filesystem::remove(source_);
    EXPECT_EQ(error(), fmt::format("[corpus] cannot read `{}`: No such file or directory", name));
    std::filesystem::create_directory(source_);
    EXPECT_EQ(error(), fmt::format("[corpus] `{}` is not a file", name));
    std::filesystem::remove(source_);
    write_text(source_, "text");
    std::filesystem::remove_all(dir_ / "cache");
    write_text(dir_ / "cache", "a file where the folder should be");
    EXPECT_EQ(error().substr(0, 38), "[corpus] cannot create the cache folde");
}

TEST(Hash, EveryBitAndTheLengthCount) {
    std::vector<char> data(100, 'a');
    const uint64_t hash = hash_bytes(data.data(), data.size());
    for (size_t i = 0; i < data.size() * 8; ++i) {
        data[i / 8] = static_cast<char>(data[i / 8] ^ (1 << (i % 8)));
        EXPECT_NE(hash_bytes(data.data(), data.size()), hash) << i;
        data[i / 8] = static_cast<char>(data[i / 8] ^ (1 << (i % 8)));
    }
    std::vector<char> zeros(64, 0);
    for (size_t n = 0; n < 64; ++n) {
        EXPECT_NE(hash_bytes(zeros.data(), n), hash_bytes(zeros.data(), n + 1)) << n;
    }
}

}  // namespace
}  // namespace ssm
