#include "ssm/io/safetensors/safetensors.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "tests/support/compare.h"
#include "tests/support/shared.h"
#include "tests/support/temp_folder.h"

namespace ssm {
namespace {

using test::error_of;
using test::read_file;
using test::TempFolder;

// A file's bytes: length, header, `data_bytes` bytes 0, 1, 2 ...
std::string file_of(std::string_view header, size_t data_bytes) {
    std::string file;
    for (int i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> (8 * i));
    file += header;
    for (size_t i = 0; i < data_bytes; ++i) file += static_cast<char>(i);
    return file;
}

SafetensorsFile parse(const std::string& file) {
    return SafetensorsFile::parse(std::as_bytes(std::span(file)), "f");
}
std::string parse_error(const std::string& file) {
    return error_of([&] { parse(file); });
}
std::string parse_error(std::string_view header, size_t data_bytes) {
    return parse_error(file_of(header, data_bytes));
}

TEST(Safetensors, ReadsTensorsScalarsAndEmptyOnes) {
    const std::string file =
        file_of(R"({"__metadata__":{"format":"pt"},"m":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]},)"
                R"("s":{"dtype":"I64","shape":[],"data_offsets":[0,8]},)"
                R"("e":{"dtype":"BF16","shape":[0,5],"data_offsets":[32,32]},)"
                R"("e0":{"data_offsets":[0,0],"shape":[4,0],"dtype":"F64"}}  )",
                32);
    const SafetensorsFile f = parse(file);
    EXPECT_EQ(f.metadata(), (Metadata{{"format", "pt"}}));
    ASSERT_EQ(f.tensors().size(), 4u);
    EXPECT_EQ(f.tensors()[0].name, "e0");
    EXPECT_EQ(f.tensors()[3].name, "e");
    EXPECT_EQ(f.tensor("m").shape(), (Shape{2, 3}));
    float value = 0;
    std::memcpy(&value, "\x08\x09\x0a\x0b", 4);
    const Tensor m = f.tensor("m");
    EXPECT_EQ((m.view<const float, 2>()(0, 0)), value);
    EXPECT_EQ(f.tensor("s").size(), 1);
    EXPECT_EQ(*f.tensor("s").data<int64_t>(), 0x0706050403020100);
    EXPECT_TRUE(static_cast<bool>(f.tensor("e"))) << "an empty tensor is not an absent one";
    EXPECT_EQ(f.tensor("e", {0, 5}).size(), 0);
    EXPECT_FALSE(f.contains("x"));
    EXPECT_EQ(error_of([&] { f.tensor("x"); }), "[safetensors] f: tensor 'x' is missing");
    EXPECT_EQ(error_of([&] {
                  f.tensor("m", {3, 2});
              }),
              "[safetensors] f: tensor 'm' must be [3, 2] but is [2, 3]");
    EXPECT_EQ(parse(file_of("{}", 0)).tensors().size(), 0u);
}

TEST(Safetensors, MisalignedDataIsCopiedAlignedIsNot) {
    for (size_t pad = 0; pad < 8; ++pad) {
        const std::string file = file_of(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},)"
                                         R"("b":{"dtype":"F64","shape":[1],"data_offsets":[16,24]}})" +
                                             std::string(pad, ' '),
                                         24);
        std::vector<double> memory(file.size() / 8 + 1);  // aligned to 8
        auto* bytes = reinterpret_cast<std::byte*>(memory.data());
        std::memcpy(bytes, file.data(), file.size());
        const auto f = SafetensorsFile::parse({bytes, file.size()}, "f");
        for (const char* name : {"a", "b"}) {
            const Tensor t = f.tensor(name);
            const std::byte* in_file = bytes + file.size() - 24 + f.find(name)->begin;
            const bool aligned = reinterpret_cast<uintptr_t>(in_file) % size_of(t.dtype()) == 0;
            EXPECT_EQ(t.raw() == in_file, aligned);
            EXPECT_EQ(reinterpret_cast<uintptr_t>(t.raw()) % size_of(t.dtype()), 0u);
            EXPECT_EQ(std::memcmp(t.raw(), in_file, t.bytes()), 0);
        }
    }
}

TEST(Safetensors, TensorsKeepTheMappingAlive) {
    const TempFolder folder;
    folder.file("m.safetensors", file_of(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}})", 3));
    Tensor t;
    {
        const auto f = SafetensorsFile::open(folder / "m.safetensors");
        EXPECT_EQ(std::filesystem::path(f.name()).filename(), "m.safetensors");
        t = f.tensor("a");
        std::filesystem::remove(folder / "m.safetensors");
    }
    EXPECT_EQ(t.data<uint8_t>()[2], 2);
}

TEST(Safetensors, ErrorsOfTheFrame) {
    EXPECT_EQ(parse_error(std::string("1234567")),
              "[safetensors] f: truncated: 7 bytes, not even a header length");
    EXPECT_EQ(parse_error(file_of("{}", 0).substr(0, 9)),
              "[safetensors] f: truncated: header of 2 bytes in a file of 9");
    EXPECT_EQ(parse_error(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)),
              "[safetensors] f: header of 18446744073709551615 bytes is larger than the format's limit of "
              "100000000");
    EXPECT_EQ(parse_error(std::string("\x00\xe1\xf5\x05\0\0\0\0{}", 10)),
              "[safetensors] f: truncated: header of 100000000 bytes in a file of 10");
    EXPECT_EQ(parse_error(std::string(8, '\0')), "[safetensors] f: header does not start with '{'");
    EXPECT_EQ(parse_error(" {}", 0), "[safetensors] f: header does not start with '{'");
    EXPECT_EQ(parse_error("{\"a\"", 0),
              "[safetensors] f: header is not valid JSON at byte 12: syntax error while parsing object "
              "separator - unexpected end of input; expected ':'");
    EXPECT_EQ(
        parse_error("{}x", 0),
        "[safetensors] f: header is not valid JSON at byte 10: syntax error while parsing value - invalid "
        "literal; last read: '{}x'; expected end of input");
    EXPECT_EQ(parse_error("{\"\xff\":1}", 0).substr(0, 60),
              "[safetensors] f: header is not valid JSON at byte 10: syntax");
}

TEST(Safetensors, ErrorsOfTheHeaderJson) {
    const auto tensor = [](std::string_view body) {
        return parse_error(fmt::format("{{\"a\":{}}}", body), 4);
    };
    const std::string f = "[safetensors] f: ";
    EXPECT_EQ(tensor("1"), f + "tensor 'a' must be an object but has a number");
    EXPECT_EQ(tensor("[]"), f + "tensor 'a' must be an object but has a list");
    EXPECT_EQ(tensor("null"), f + "tensor 'a' must be an object but has null");
    EXPECT_EQ(tensor("{}"), f + "tensor 'a' has no 'dtype'");
    EXPECT_EQ(tensor(R"({"dtype":"F32"})"), f + "tensor 'a' has no 'shape'");
    EXPECT_EQ(tensor(R"({"dtype":"F32","shape":[]})"), f + "tensor 'a' has no 'data_offsets'");
    EXPECT_EQ(tensor(R"({"dtype":"F99"})"), f + "tensor 'a' has the unknown dtype 'F99'");
    EXPECT_EQ(tensor(R"({"dtype":7})"), f + "'dtype' of tensor 'a' must be a string but has a number");
    EXPECT_EQ(tensor(R"({"dtype":"F32","dtype":"F32"})"), f + "'dtype' of tensor 'a' appears twice");
    EXPECT_EQ(tensor(R"({"shape":[1],"shape":[1]})"), f + "'shape' of tensor 'a' appears twice");
    EXPECT_EQ(tensor(R"({"strides":[1]})"), f + "'strides' of tensor 'a' is not a field of this format");
    EXPECT_EQ(tensor(R"({"strides":true})"), f + "'strides' of tensor 'a' is not a field of this format");
    const std::string shape = "'shape' of tensor 'a' must be a list of integers >= 0 but has ";
    EXPECT_EQ(tensor(R"({"shape":3})"), f + shape + "a number");
    EXPECT_EQ(tensor(R"({"shape":[-1]})"), f + shape + "a negative number");
    EXPECT_EQ(tensor(R"({"shape":[1.5]})"), f + shape + "a fraction or a number past 2^64");
    EXPECT_EQ(tensor(R"({"shape":[18446744073709551616]})"), f + shape + "a fraction or a number past 2^64");
    EXPECT_EQ(tensor(R"({"shape":["1"]})"), f + shape + "a string");
    EXPECT_EQ(tensor(R"({"shape":[true]})"), f + shape + "a boolean");
    EXPECT_EQ(tensor(R"({"shape":[[1]]})"), f + shape + "a list");
    EXPECT_EQ(tensor(R"({"shape":[{}]})"), f + shape + "an object");
    std::string many = "0";
    for (int i = 0; i < 32; ++i) many += ",0";
    EXPECT_EQ(tensor(fmt::format("{{\"shape\":[{}]}}", many)),
              f + "'shape' of tensor 'a' has more than 32 numbers");
    EXPECT_EQ(parse_error(R"({"__metadata__":{"a":1}})", 0),
              f + "metadata 'a' must be a string but has a number");
    EXPECT_EQ(parse_error(R"({"__metadata__":{"a":"x","a":"y"}})", 0), f + "metadata 'a' appears twice");
    EXPECT_EQ(parse_error(R"({"__metadata__":{},"__metadata__":{}})", 0),
              f + "the header has '__metadata__' twice");
    EXPECT_EQ(parse_error(std::string(1'000'000, '{'), 0).substr(0, 66),
              "[safetensors] f: header is not valid JSON at byte 9: syntax error ");
    EXPECT_EQ(parse_error("{\"a\":" + std::string(1'000'000, '['), 0),
              f + "tensor 'a' must be an object but has a list");
}

TEST(Safetensors, ErrorsOfLayout) {
    const auto two = [](std::string_view a, std::string_view b, size_t data) {
        return parse_error(fmt::format(R"({{"a":{{"dtype":"U8","shape":[{}],"data_offsets":[{}]}},)"
                                       R"("b":{{"dtype":"U8","shape":[{}],"data_offsets":[{}]}}}})",
                                       a.substr(0, 1), a.substr(2), b.substr(0, 1), b.substr(2)),
                           data);
    };
    const std::string f = "[safetensors] f: ";
    EXPECT_EQ(two("4:0,4", "4:4,8", 8), "(no error)");
    EXPECT_EQ(two("4:4,8", "4:0,4", 8), "(no error)") << "the order in the header is free";
    EXPECT_EQ(two("4:0,4", "4:2,6", 6), f + "tensor 'b' at bytes 2..6 overlaps tensor 'a' at 0..4");
    EXPECT_EQ(two("4:0,4", "4:0,4", 4), f + "tensor 'b' at bytes 0..4 overlaps tensor 'a' at 0..4");
    EXPECT_EQ(two("4:0,4", "4:6,9", 10),
              f + "tensor 'b' is U8 [4] = 4 bytes but its data_offsets are [6, 9]");
    EXPECT_EQ(two("4:0,4", "4:6,10", 10), f + "bytes 4..6, before tensor 'b', belong to no tensor");
    EXPECT_EQ(two("4:2,6", "4:6,10", 10), f + "bytes 0..2, before tensor 'a', belong to no tensor");
    EXPECT_EQ(two("4:0,4", "4:4,8", 7), f + "truncated: tensor 'b' ends at byte 8 of 7 bytes of data");
    EXPECT_EQ(two("4:0,4", "4:4,8", 9), f + "the last 1 bytes of the file belong to no tensor");
    EXPECT_EQ(two("4:4,0", "4:4,8", 8), f + "tensor 'a' is U8 [4] = 4 bytes but its data_offsets are [4, 0]");
    EXPECT_EQ(two("4:0", "4:4,8", 8), f + "tensor 'a' must have two data_offsets but has 1");
    EXPECT_EQ(two("4:0,4,8", "4:4,8", 8), f + "tensor 'a' must have two data_offsets but has 3");
    EXPECT_EQ(parse_error("{}", 1), f + "the last 1 bytes of the file belong to no tensor");
    const std::string twice = R"("a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
    EXPECT_EQ(parse_error(fmt::format("{{{0},{0}}}", twice), 0), f + "tensor 'a' appears twice");
}

TEST(Safetensors, ShapesThatOverflow) {
    const auto shape = [](std::string_view s) {
        return parse_error(fmt::format(R"({{"a":{{"dtype":"F32","shape":[{}],"data_offsets":[0,0]}}}})", s),
                           0);
    };
    const std::string f = "[safetensors] f: tensor 'a' ";
    EXPECT_EQ(shape("4294967296,4294967296"), f + "has a shape that overflows: [4294967296, 4294967296]");
    EXPECT_EQ(shape("0,4294967296,4294967296"),
              f + "has a shape that overflows: [0, 4294967296, 4294967296]");
    EXPECT_EQ(shape("18446744073709551615"), f + "has a shape that overflows: [18446744073709551615]");
    EXPECT_EQ(shape("0,18446744073709551615"), f + "has a shape that overflows: [0, 18446744073709551615]");
    EXPECT_EQ(shape("2305843009213693951"),
              f + "is F32 [2305843009213693951] = 9223372036854775804 bytes but its data_offsets are [0, 0]");
    EXPECT_EQ(shape("0,2305843009213693951"), "(no error)");
}

TEST(Safetensors, HostileNamesStayOneLine) {
    const std::string error = parse_error(
        "{\"" + std::string(10'000, 'n') + "\\n\\u001b\":{\"dtype\":\"\\n" + std::string(99, 'd') + "\"}}",
        0);
    EXPECT_LT(error.size(), 250u);
    EXPECT_EQ(error.find('\n'), std::string::npos);
}

TEST(Safetensors, EveryTruncationAndEveryFlippedHeaderByteIsCaughtOrHarmless) {
    const std::string file = file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8);
    for (size_t n = 0; n < file.size(); ++n) EXPECT_NE(parse_error(file.substr(0, n)), "(no error)") << n;
    for (size_t i = 0; i < file.size() - 8; ++i) {
        for (int bit = 0; bit < 8; ++bit) {
            std::string bad = file;
            bad[i] = static_cast<char>(bad[i] ^ (1 << bit));
            try {
                const SafetensorsFile f = parse(bad);  // another name or dtype of the same size, at most
                ASSERT_EQ(f.tensors().size(), 1u);
                EXPECT_EQ(f.tensors()[0].end, 8u);
            } catch (const Error& e) {
                EXPECT_EQ(std::string_view(e.what()).substr(0, 17), "[safetensors] f: ");
            }
        }
    }
}

TEST(WriteSafetensors, BytesByHand) {
    const TempFolder folder;
    const Tensor a = Tensor::from_floats({2, 2}, {1, 2, 3, 4});
    const Tensor b = Tensor::zeros({1}, DType::i64), c = a.to(DType::bf16);
    write_safetensors(folder / "m", {{"c", c}, {"a", a}, {"b", b}});
    // By descending alignment, then by name, padded to a multiple of 8.
    const std::string header =
        R"({"__metadata__":{"format":"pt"},"b":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
        R"("a":{"dtype":"F32","shape":[2,2],"data_offsets":[8,24]},)"
        R"("c":{"dtype":"BF16","shape":[2,2],"data_offsets":[24,32]}})";
    const std::string padded = header + std::string((8 - header.size() % 8) % 8, ' ');
    std::string expected = file_of(padded, 0) + std::string(8, '\0');
    expected.append(reinterpret_cast<const char*>(a.raw()), a.bytes());
    expected.append(reinterpret_cast<const char*>(c.raw()), c.bytes());
    EXPECT_EQ(read_file(folder / "m"), expected);
}

TEST(WriteSafetensors, RoundTripsEveryDtypeAndStride) {
    const TempFolder folder;
    test::Random random(1);
    std::vector<NamedTensor> tensors;
    for (const DType t : {DType::f32, DType::bf16, DType::f16, DType::f64, DType::i8, DType::u8, DType::i16,
                          DType::u16, DType::i32, DType::u32, DType::i64, DType::u64, DType::boolean}) {
        Tensor x = Tensor::empty({3, 5}, t);
        for (size_t i = 0; i < x.bytes(); ++i) x.raw()[i] = static_cast<std::byte>(random.integer(0, 255));
        tensors.push_back({fmt::format("t.{}", name_of(t)), x});
        tensors.push_back({fmt::format("slice.{}", name_of(t)), x.columns(1, 4)});
    }
    const Tensor tall = Tensor::from_floats({300'000, 3}, random.vector(900'000));
    tensors.push_back({"tall", tall.columns(0, 2)});  // more rows than the gather buffer holds
    tensors.push_back({"scalar", Tensor::from_floats({}, {7})});
    tensors.push_back({"empty", Tensor::empty({0, 3}, DType::f32)});
    tensors.push_back({"n\xc3\xa4me \"quoted\"\n", Tensor::from_floats({1}, {8})});
    write_safetensors(folder / "m", tensors, {});
    const auto f = SafetensorsFile::open(folder / "m");
    EXPECT_EQ(f.tensors().size(), tensors.size());
    EXPECT_TRUE(f.metadata().empty());
    for (const auto& [name, tensor] : tensors) {
        const Tensor got = f.tensor(name, tensor.shape()), want = tensor.clone();
        EXPECT_EQ(got.dtype(), want.dtype()) << name;
        EXPECT_TRUE(want.size() == 0 || std::memcmp(got.raw(), want.raw(), want.bytes()) == 0) << name;
    }
}

// Files that the reference library wrote come back byte for byte.
TEST(WriteSafetensors, SameBytesAsTheReferenceLibrary) {
    const auto shared = test::shared_dir();
    if (shared.empty()) GTEST_SKIP() << "no shared folder";
    const TempFolder folder;
    for (const char* path :
         {"checkpoints/mamba-stories/model-00001-of-00002.safetensors",
          "checkpoints/mamba-stories/model-00002-of-00002.safetensors",
          "fixtures/models/mamba/model.safetensors", "fixtures/models/mamba/expected.safetensors",
          "fixtures/models/mamba2/expected.safetensors", "fixtures/ops/ssd.safetensors"}) {
        const auto f = SafetensorsFile::open(shared / path);
        std::vector<NamedTensor> tensors;
        for (const TensorInfo& t : f.tensors()) tensors.insert(tensors.begin(), {t.name, f.tensor(t.name)});
        write_safetensors(folder / "copy", tensors, f.metadata());
        EXPECT_TRUE(read_file(folder / "copy") == read_file(shared / path)) << path;
    }
}

TEST(WriteSafetensors, Errors) {
    const TempFolder folder;
    const Tensor x = Tensor::from_floats({1}, {1});
    const auto write_error = [&](std::vector<NamedTensor> tensors, const Metadata& metadata = {}) {
        return error_of([&] { write_safetensors(folder / "m", tensors, metadata); });
    };
    EXPECT_EQ(write_error({{"a", x}, {"a", x}}), "[safetensors] tensor 'a' to be written appears twice");
    EXPECT_EQ(write_error({{"a", Tensor()}}), "[safetensors] tensor 'a' to be written is empty");
    EXPECT_EQ(write_error({{"__metadata__", x}}), "[safetensors] a tensor cannot be named '__metadata__'");
    EXPECT_EQ(write_error({{"a\xff", x}}), "[safetensors] name 'a\xff' is not valid UTF-8");
    EXPECT_EQ(write_error({}, {{"k", "\xc3"}}), "[safetensors] name '\xc3' is not valid UTF-8");
    EXPECT_FALSE(std::filesystem::exists(folder / "m"));
    EXPECT_FALSE(std::filesystem::exists(folder / "m.partial"));
}

}  // namespace
}  // namespace ssm
