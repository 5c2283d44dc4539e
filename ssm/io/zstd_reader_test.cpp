#include "ssm/io/zstd_reader.h"

#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include <sys/stat.h>
#include <zstd.h>

#include "tests/support/compare.h"
#include "tests/support/temp_folder.h"

namespace ssm {
namespace {

using test::error_of;
using test::TempFolder;

std::string compress(std::string_view text, bool checksum = true) {
    ZSTD_CCtx* c = ZSTD_createCCtx();
    ZSTD_CCtx_setParameter(c, ZSTD_c_checksumFlag, checksum ? 1 : 0);
    std::string out(ZSTD_compressBound(text.size()), '\0');
    out.resize(ZSTD_compress2(c, out.data(), out.size(), text.data(), text.size()));
    ZSTD_freeCCtx(c);
    return out;
}

// One frame without a checksum in blocks of `block` bytes: the last one may not fit the reader's buffer.
std::string compress_in_blocks(std::string_view text, size_t block) {
    ZSTD_CCtx* c = ZSTD_createCCtx();
    std::string out(ZSTD_compressBound(text.size()) + 1000, '\0');
    ZSTD_outBuffer to{out.data(), out.size(), 0};
    for (size_t at = 0; at < text.size(); at += block) {
        const std::string_view piece = text.substr(at, block);
        ZSTD_inBuffer from{piece.data(), piece.size(), 0};
        ZSTD_compressStream2(c, &to, &from, at + block < text.size() ? ZSTD_e_flush : ZSTD_e_end);
    }
    ZSTD_freeCCtx(c);
    out.resize(to.pos);
    return out;
}

// Lines of 0 to 200 letters, some megabytes: many buffers of the reader.
std::string random_text(size_t bytes) {
    test::Random random(7);
    std::string text;
    while (text.size() < bytes) {
        text.append(static_cast<size_t>(random.integer(0, 200)),
                    static_cast<char>('a' + random.integer(0, 25)));
        text += '\n';
    }
    return text;
}

std::string read_all(const std::filesystem::path& path, size_t piece = 65'536) {
    ZstdReader reader(path);
    std::string all, buffer(piece, '\0');
    while (const size_t n = reader.read(buffer)) all.append(buffer, 0, n);
    EXPECT_EQ(reader.read(buffer), 0u) << "the end stays the end";
    EXPECT_TRUE(read_whole_text(path) == all);
    return all;
}

std::vector<std::string> lines_of(const std::filesystem::path& path) {
    ZstdReader reader(path);
    std::vector<std::string> lines;
    for (std::string line; reader.line(line);) lines.push_back(line);
    EXPECT_EQ(reader.lines(), lines.size());
    return lines;
}

TEST(ZstdReader, PlainAndCompressedAreTheSameText) {
    const TempFolder folder;
    const std::string text = random_text(3'000'000);
    const auto plain = folder.file("a.txt", text), packed = folder.file("a.txt.zst", compress(text));
    for (const size_t piece : {1'000u, 65'536u, 1'000'000u}) {
        EXPECT_TRUE(read_all(plain, piece) == text) << piece;
        EXPECT_TRUE(read_all(packed, piece) == text) << piece;
    }
    EXPECT_TRUE(lines_of(plain) == lines_of(packed));
    EXPECT_TRUE(read_all(folder.file("named_otherwise.txt", compress(text))) == text);
}

TEST(ZstdReader, EverySizeAroundABuffer) {
    const TempFolder folder;
    const std::string text = random_text(600'000);
    for (const size_t size : {1u, 262'143u, 262'144u, 262'145u, 524'287u, 524'288u, 524'289u}) {
        const std::string part = text.substr(0, size);
        EXPECT_TRUE(read_all(folder.file("a.zst", compress(part))) == part) << size;
        EXPECT_TRUE(read_all(folder.file("a", part)) == part) << size;
    }
}

TEST(ZstdReader, BlocksThatDoNotFitTheBuffer) {
    const TempFolder folder;
    const std::string text = random_text(700'000);
    for (const size_t block : {100'000u, 99'999u, 130'000u}) {
        for (const size_t size : {299'000u, 300'000u, 600'000u}) {
            const std::string part = text.substr(0, size);
            EXPECT_TRUE(read_all(folder.file("a", compress_in_blocks(part, block))) == part) << block;
        }
    }
}

TEST(ZstdReader, LinesEndInEveryWay) {
    const TempFolder folder;
    using Lines = std::vector<std::string>;
    for (const bool packed : {false, true}) {
        const auto lines = [&](std::string_view text) {
            return lines_of(folder.file("a", packed ? compress(text) : std::string(text)));
        };
        EXPECT_EQ(lines("a\nb\n"), (Lines{"a", "b"}));
        EXPECT_EQ(lines("a\r\n\r\nb"), (Lines{"a\r", "\r", "b"})) << "a return is text";
        EXPECT_EQ(lines("\n"), (Lines{""}));
        EXPECT_EQ(lines("a\rb\r"), (Lines{"a\rb\r"}));
        EXPECT_EQ(lines(""), Lines{});
        const std::string longer(1'000'000, 'x');
        EXPECT_TRUE(lines(longer + "\ny") == (Lines{longer, "y"}));
    }
}

TEST(ZstdReader, FramesInARowAreOneText) {
    const TempFolder folder;
    const std::string skippable("\x50\x2a\x4d\x18\x03\0\0\0abc", 11);
    const std::string file =
        skippable + compress("one\ntw") + compress("") + skippable + compress("o\nthree");
    EXPECT_EQ(lines_of(folder.file("a.zst", file)), (std::vector<std::string>{"one", "two", "three"}));
}

TEST(ZstdReader, ReadsAPipe) {
    const TempFolder folder;
    ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
    const std::string text = random_text(1'000'000), packed = compress(text);
    std::thread writer([&] {
        std::ofstream out(folder / "pipe", std::ios::binary);
        for (size_t i = 0; i < 6; ++i) out << packed[i] << std::flush;  // the magic number in pieces
        out << packed.substr(6);
    });
    ZstdReader reader(folder / "pipe");
    std::string all, buffer(10'000, '\0');
    while (const size_t n = reader.read(buffer)) all.append(buffer, 0, n);
    writer.join();
    EXPECT_TRUE(all == text);
}

TEST(ZstdReader, EveryTruncationIsAnError) {
    const TempFolder folder;
    const std::string whole = compress("some text that is short") + compress("and more of it");
    const size_t first = compress("some text that is short").size();
    const auto path = folder / "a";
    const std::string truncated = "[zstd] " + path.string() + ": truncated: the file ends inside a frame";
    for (size_t n = 4; n < whole.size(); ++n) {
        folder.file("a", whole.substr(0, n));
        EXPECT_EQ(error_of([&] { read_all(path); }), n == first ? "(no error)" : truncated) << n;
    }
    const std::string large = compress(random_text(2'000'000));
    folder.file("a", large.substr(0, large.size() / 2));
    EXPECT_EQ(error_of([&] { lines_of(path); }), truncated);
}

TEST(ZstdReader, DamageIsAnError) {
    const TempFolder folder;
    const auto path = folder / "a";
    const std::string where = "[zstd] " + path.string() + ": damaged after byte ";
    std::string file = compress("some text that is short");
    file.back() = static_cast<char>(file.back() ^ 1);
    folder.file("a", file);
    EXPECT_EQ(error_of([&] { read_all(path); }), where + "0: Restored data doesn't match checksum");
    folder.file("a", compress("text") + "garbage");
    EXPECT_EQ(error_of([&] { read_all(path); }),
              fmt::format("{}{}: Unknown frame descriptor", where, compress("text").size()));
    folder.file("a", std::string("\x28\xb5\x2f\xfd\x00\xff\xff\xff\xff", 9));
    EXPECT_EQ(error_of([&] { read_all(path); }).substr(0, where.size()), where);
}

// A header of a few bytes may not make the decoder allocate a window of gigabytes.
TEST(ZstdReader, HugeWindowsAreRefused) {
    const TempFolder folder;
    const auto path = folder.file("a", std::string("\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00", 9));
    const std::string error = error_of([&] { read_all(path); });
    EXPECT_NE(error.find("Frame requires too much memory for decoding"), std::string::npos) << error;
}

TEST(ZstdReader, Errors) {
    const TempFolder folder;
    const std::string p = folder.path().string();
    EXPECT_EQ(error_of([&] { ZstdReader r(folder / "none"); }), "[file] " + p + "/none: does not exist");
    EXPECT_EQ(error_of([&] { ZstdReader r(folder.path()); }), "[file] " + p + ": is a directory");
    EXPECT_EQ(error_of([&] { ZstdReader r(folder.file("a.zst", "plain text")); }),
              "[zstd] " + p + "/a.zst: is not zstd data");
    EXPECT_EQ(error_of([&] { ZstdReader r(folder.file("a.zst", "")); }),
              "[zstd] " + p + "/a.zst: is not zstd data");
    folder.file("long", "ok\n123456\n");
    ZstdReader reader(folder / "long");
    std::string line;
    EXPECT_TRUE(reader.line(line, 5));
    EXPECT_EQ(error_of([&] { reader.line(line, 5); }),
              "[text] " + p + "/long: line 2 is longer than 5 bytes");
    // A bomb: 64 MB in one line, a few kilobytes on the disk, stops at the limit.
    folder.file("bomb.zst", compress(std::string(64'000'000, 'x')));
    EXPECT_LT(std::filesystem::file_size(folder / "bomb.zst"), 10'000u);
    ZstdReader bomb(folder / "bomb.zst");
    EXPECT_EQ(error_of([&] { bomb.line(line, 1'000'000); }),
              "[text] " + p + "/bomb.zst: line 1 is longer than 1000000 bytes");
    EXPECT_LE(line.capacity(), 2'500'000u);
    EXPECT_EQ(error_of([&] { read_whole_text(folder / "bomb.zst", 1'000'000); }),
              "[text] " + p + "/bomb.zst: is longer than 1000000 bytes");
    EXPECT_EQ(read_whole_text(folder / "long", 10), "ok\n123456\n");
    EXPECT_EQ(error_of([&] { read_whole_text(folder / "long", 9); }),
              "[text] " + p + "/long: is longer than 9 bytes");
}

}  // namespace
}  // namespace ssm
