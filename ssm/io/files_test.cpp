// mapped_file, atomic_file, ids: content, and every way the system can refuse.
#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>
#include <string>

#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ssm/io/atomic_file.h"
#include "ssm/io/ids.h"
#include "ssm/io/mapped_file.h"
#include "ssm/io/printable.h"
#include "tests/support/shared.h"
#include "tests/support/temp_folder.h"

namespace ssm {
namespace {

namespace fs = std::filesystem;
using test::error_of;
using test::read_file;
using test::TempFolder;

size_t files_in(const fs::path& folder) {
    return static_cast<size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

TEST(MappedFile, ReadsTheSameBytesMappedOrNot) {
    const TempFolder folder;
    std::string content;
    for (int i = 0; i < 10'000; ++i) content += static_cast<char>(i * 7);
    const auto path = folder.file("a", content);
    const auto mapped = MappedFile::open(path);
    const auto read = MappedFile::open(path, MappedFile::Access::read);
    EXPECT_TRUE(mapped->mapped());
    EXPECT_FALSE(read->mapped());
    EXPECT_EQ(mapped->text(), content);
    EXPECT_EQ(read->text(), content);
    EXPECT_EQ(read_text_file(path), content);
    fs::remove(path);
    EXPECT_EQ(mapped->text(), content) << "a mapping outlives the name of its file";
}

TEST(MappedFile, Errors) {
    const TempFolder folder;
    const std::string p = folder.path().string();
    EXPECT_EQ(error_of([&] { MappedFile::open(folder / "none"); }), "[file] " + p + "/none: does not exist");
    EXPECT_EQ(error_of([&] { MappedFile::open(folder.path()); }), "[file] " + p + ": is a directory");
    EXPECT_EQ(error_of([&] { MappedFile::open(folder.file("e", "")); }), "[file] " + p + "/e: is empty");
    ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
    EXPECT_EQ(error_of([&] { MappedFile::open(folder / "pipe"); }),
              "[file] " + p + "/pipe: is not a regular file");
    EXPECT_EQ(error_of([&] { MappedFile::open(folder.file("f", "x") / "below"); }),
              "[file] " + p + "/f/below: does not exist");
    EXPECT_EQ(error_of([&] { read_text_file(folder.file("long", "12345"), 4); }),
              "[file] " + p + "/long: has 5 bytes; at most 4 are read");
    EXPECT_EQ(read_text_file(folder.file("e", "")), "");
}

TEST(AtomicFile, AppearsAtCommitOnly) {
    const TempFolder folder;
    const auto path = folder.file("a", "old");
    {
        AtomicFile file(path);
        file.write("new ");
        file.write("content");
        EXPECT_EQ(file.bytes_written(), 11u);
        EXPECT_EQ(read_file(path), "old");
        file.commit();
        EXPECT_EQ(read_file(path), "new content");
    }
    { AtomicFile(path).write("dropped"); }
    EXPECT_EQ(read_file(path), "new content");
    EXPECT_EQ(files_in(folder.path()), 1u) << "a partial file stayed";
}

TEST(AtomicFile, OverwritesWhatAKilledWriterLeft) {
    const TempFolder folder;
    folder.file("a.partial", "a longer rest of a killed writer");
    write_file_atomic(folder / "a", "short");
    EXPECT_EQ(read_file(folder / "a"), "short");
    EXPECT_EQ(files_in(folder.path()), 1u);
}

TEST(AtomicFile, RefusesASecondWriter) {
    const TempFolder folder;
    AtomicFile first(folder / "a");
    first.write("first");
    EXPECT_EQ(error_of([&] { AtomicFile second(folder / "a"); }),
              "[file] " + (folder / "a").string() + ": is being written by someone else");
    first.commit();
    EXPECT_EQ(read_file(folder / "a"), "first");
}

TEST(AtomicFile, ErrorsOfPlace) {
    const TempFolder folder;
    const std::string p = folder.path().string();
    EXPECT_EQ(error_of([&] { AtomicFile file(folder / "none/a"); }),
              "[file] " + p + "/none/a: cannot be written: No such file or directory");
    EXPECT_EQ(error_of([&] { AtomicFile file(folder.path()); }),
              "[file] " + p + ": cannot be written: it is a directory");
    // As root a rename would put a file in the place of /dev/null.
    const fs::path pipe = folder / "pipe";
    ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
    EXPECT_EQ(error_of([&] { AtomicFile file(pipe); }),
              "[file] " + pipe.string() + ": cannot be written: it is not a regular file");
    EXPECT_TRUE(fs::is_fifo(pipe));
    // A link is replaced, what it points to is not.
    fs::create_symlink(folder.file("target", "old"), folder / "link");
    write_file_atomic(folder / "link", "new");
    EXPECT_EQ(read_file(folder / "target") + read_file(folder / "link"), "oldnew");
}

TEST(AtomicFile, ReadOnlyFolder) {
    const TempFolder folder;
    const auto path = folder.file("a", "old");
    fs::permissions(folder.path(), fs::perms::owner_read | fs::perms::owner_exec | fs::perms::others_exec |
                                       fs::perms::others_read);
    const uid_t me = geteuid();
    // Permissions do not bind root.
    ASSERT_EQ(me == 0 ? seteuid(65534) : 0, 0);
    const std::string error = error_of([&] { write_file_atomic(path, "new"); });
    ASSERT_EQ(me == 0 ? seteuid(me) : 0, 0);
    fs::permissions(folder.path(), fs::perms::owner_all);
    EXPECT_EQ(error, "[file] " + path.string() + ": cannot be written: Permission denied");
    EXPECT_EQ(read_file(path), "old");
    EXPECT_EQ(files_in(folder.path()), 1u);
}

// A limit on file sizes stands in for a full disk: write() fails midway in both.
TEST(AtomicFile, FailedWriteKeepsTheOldFile) {
    const TempFolder folder;
    const auto path = folder.file("a", "old");
    rlimit before{};
    ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
    const rlimit small{4096, before.rlim_max};
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
    const std::string error = error_of([&] { write_file_atomic(path, std::string(10'000, 'x')); });
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
    std::signal(SIGXFSZ, handler);
    EXPECT_EQ(error, "[file] " + path.string() + ": cannot be written: File too large");
    EXPECT_EQ(read_file(path), "old");
    EXPECT_EQ(files_in(folder.path()), 1u);
}

TEST(AtomicFile, ClosedIsClosed) {
    const TempFolder folder;
    AtomicFile file(folder / "a");
    file.commit();
    EXPECT_EQ(error_of([&] { file.write("x"); }),
              "[file] " + (folder / "a").string() + ": is already closed");
    EXPECT_EQ(error_of([&] { file.commit(); }), "[file] " + (folder / "a").string() + ": is already closed");
}

TEST(ReadIds, BothWidths) {
    const TempFolder folder;
    const auto path = folder.file("ids", std::string("\x01\x02\xff\xff\x00\x00\x07\x00", 8));
    EXPECT_EQ(read_ids(path, IdType::u16), (std::vector<int32_t>{0x0201, 0xffff, 0, 7}));
    const auto wide = folder.file("wide", std::string("\x01\x02\x03\x04\xff\xff\xff\x7f", 8));
    EXPECT_EQ(read_ids(wide, IdType::u32), (std::vector<int32_t>{0x04030201, 0x7fffffff}));
    EXPECT_EQ(id_type_from_name("uint16"), IdType::u16);
    EXPECT_EQ(id_type_from_name("uint32"), IdType::u32);
}

TEST(ReadIds, Errors) {
    const TempFolder folder;
    const std::string p = folder.path().string();
    EXPECT_EQ(error_of([&] { read_ids(folder.file("a", "123"), IdType::u16); }),
              "[ids] " + p + "/a: 3 bytes are no whole number of uint16");
    EXPECT_EQ(error_of([&] { read_ids(folder.file("a", "123456"), IdType::u32); }),
              "[ids] " + p + "/a: 6 bytes are no whole number of uint32");
    EXPECT_EQ(
        error_of([&] { read_ids(folder.file("a", std::string("\0\0\0\0\0\0\0\x80", 8)), IdType::u32); }),
        "[ids] " + p + "/a: id 2147483648 at place 1 is past 2^31 - 1");
    EXPECT_EQ(error_of([&] { read_ids(folder.file("a", ""), IdType::u16); }), "[file] " + p + "/a: is empty");
    EXPECT_EQ(error_of([] { id_type_from_name("int8"); }),
              "[ids] type must be uint16 or uint32 but is 'int8'");
}

TEST(ReadIds, ReadsTheStoryIds) {
    const fs::path shared = test::shared_dir();
    if (shared.empty()) GTEST_SKIP() << "no shared folder";
    const auto ids = read_ids(shared / "checkpoints/mamba-stories/valid_ids.bin", IdType::u16);
    EXPECT_GT(ids.size(), 16'383u);
    for (const int32_t id : ids) ASSERT_LT(id, 8192);
}

TEST(Printable, CutsAndCleans) {
    EXPECT_EQ(printable("a\nb\x1b[0m\x7f"), "a?b?[0m?");
    EXPECT_EQ(printable("abcdef", 3), "abc...");
    EXPECT_EQ(printable("ab\xc3\xa9", 3), "ab...") << "a UTF-8 character is not cut in half";
    EXPECT_EQ(printable("ab\xc3\xa9"), "ab\xc3\xa9");
}

}  // namespace
}  // namespace ssm
