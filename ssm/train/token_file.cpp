#include "ssm/train/token_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <optional>
#include <span>

#include "ssm/core/error.h"
#include "ssm/core/parallel.h"
#include "ssm/train/durable.h"
#include "ssm/train/hash.h"

namespace ssm {
namespace fs = std::filesystem;

namespace {

constexpr char kMagic[8] = {'s', 's', 'm', 't', 'o', 'k', '0', '1'};

// The first bytes of the file; all integers little-endian.
struct Header {
    char magic[8];
    uint64_t id_bytes, tokens, documents, text_bytes;
    uint64_t source_size, source_hash;
    int64_t source_time;  // nanoseconds
    uint64_t fingerprint;
    uint64_t content_hash;
    uint64_t header_hash;  // of all fields above
};
static_assert(sizeof(Header) == 88);

uint64_t hash_of(const Header& h) { return hash_bytes(&h, offsetof(Header, header_hash)); }

size_t padded(uint64_t bytes) { return (bytes + 7) / 8 * 8; }

struct SourceStamp {
    uint64_t size;
    int64_t time;
};

SourceStamp stamp(const fs::path& source) {
    struct stat s {};
    if (::stat(source.c_str(), &s) != 0) {
        fail(ErrorCode::io, "corpus", "cannot read `{}`: {}", source.string(), std::strerror(errno));
    }
    require(S_ISREG(s.st_mode), "corpus", "`{}` is not a file", source.string());
    return {static_cast<uint64_t>(s.st_size), s.st_mtim.tv_sec * int64_t{1000000000} + s.st_mtim.tv_nsec};
}

// The file in memory; absent when it does not exist or is empty.
struct Mapped {
    std::shared_ptr<const std::byte> data;
    size_t size = 0;
};
Mapped map_file(const fs::path& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return {};
    struct stat s {};
    Mapped m;
    if (::fstat(fd, &s) == 0 && s.st_size > 0) {
        const auto size = static_cast<size_t>(s.st_size);
        void* p = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
        if (p != MAP_FAILED) {
            m.data = {static_cast<const std::byte*>(p),
                      [size](const std::byte* q) { ::munmap(const_cast<std::byte*>(q), size); }};
            m.size = size;
        }
    }
    ::close(fd);
    return m;
}

uint64_t hash_file(const fs::path& path) {
    const Mapped m = map_file(path);
    return hash_bytes(m.data.get(), m.size);
}

fs::path cache_name(const fs::path& source, const fs::path& cache, uint64_t fingerprint) {
    const uint64_t place = hash_bytes(fs::absolute(source).lexically_normal().string(), fingerprint);
    return cache / fmt::format("{}-{:016x}.tokens", source.filename().string(), place);
}

// Encodes documents in batches of a few MiB, the documents of a batch side by side.
class Builder {
public:
    Builder(const Exec& ex, const TextEncoder& encoder, DurableFile& out, bool wide)
        : ex_(ex), encoder_(encoder), out_(out), wide_(wide) {
        const int32_t eos = encoder.end_of_document;
        put(std::span(&eos, 1));
    }

    void run(DocumentReader& reader) {
        std::vector<std::string> batch;
        size_t bytes = 0;
        std::string document;
        while (reader.next(document)) {
            bytes += document.size();
            batch.push_back(std::move(document));
            if (bytes >= kBatchBytes) {
                encode(batch);
                bytes = 0;
            }
        }
        encode(batch);
    }
    // Writes the offsets; the header's counts.
    void finish(Header& h) {
        h.tokens = tokens_;
        h.documents = offsets_.size();
        h.text_bytes = text_bytes_;
        offsets_.push_back(tokens_);
        const size_t bytes = tokens_ * h.id_bytes;
        const uint64_t zero = 0;
        out_.write(&zero, padded(bytes) - bytes);
        out_.write(offsets_.data(), offsets_.size() * sizeof(uint64_t));
    }

private:
    static constexpr size_t kBatchBytes = size_t{4} << 20;

    void encode(std::vector<std::string>& batch) {
        std::vector<std::vector<int32_t>> ids(batch.size());
        std::vector<std::exception_ptr> errors(batch.size());
        parallel_for(ex_, static_cast<int64_t>(batch.size()), 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                try {
                    encoder_.encode(batch[i], ids[i]);
                    ids[i].push_back(encoder_.end_of_document);
                } catch (...) {
                    errors[i] = std::current_exception();
                }
            }
        });
        for (size_t i = 0; i < batch.size(); ++i) {
            if (errors[i]) std::rethrow_exception(errors[i]);
            offsets_.push_back(tokens_);
            text_bytes_ += batch[i].size();
            put(ids[i]);
        }
        batch.clear();
    }
    void put(std::span<const int32_t> ids) {
        tokens_ += ids.size();
        if (wide_) {
            out_.write(ids.data(), ids.size_bytes());
            return;
        }
        narrow_.assign(ids.begin(), ids.end());
        out_.write(narrow_.data(), narrow_.size() * sizeof(uint16_t));
    }

    const Exec& ex_;
    const TextEncoder& encoder_;
    DurableFile& out_;
    bool wide_;
    uint64_t tokens_ = 0, text_bytes_ = 0;
    std::vector<uint64_t> offsets_;
    std::vector<uint16_t> narrow_;
};

void build(const Exec& ex, const fs::path& source, const fs::path& target, const TextEncoder& encoder,
           const DocumentOptions& options, uint64_t fingerprint) {
    Header h{};
    std::memcpy(h.magic, kMagic, sizeof kMagic);
    h.fingerprint = fingerprint;
    const SourceStamp before = stamp(source);  // a source that changes meanwhile makes the cache stale
    h.source_size = before.size;
    h.source_time = before.time;
    DocumentReader reader(source, options);
    h.source_hash = hash_file(source);
    const bool wide = encoder.vocabulary > 65536;
    h.id_bytes = wide ? 4 : 2;

    DurableFile out(target);
    out.write(&h, sizeof h);
    Builder builder(ex, encoder, out, wide);
    builder.run(reader);
    builder.finish(h);
    if (h.documents == 0) fail(ErrorCode::bad_file, "corpus", "`{}` has no documents", source.string());
    out.flush();
    const Mapped written = map_file(out.temporary());
    h.content_hash = hash_bytes(written.data.get() + sizeof h, written.size - sizeof h);
    h.header_hash = hash_of(h);
    out.write_at(0, &h, sizeof h);
    out.commit();
}

}  // namespace

struct TokenFileParser {
    // The file if it is sound and made from this source.
    static std::optional<TokenFile> parse(const fs::path& path, const fs::path& source,
                                          const TextEncoder& encoder, uint64_t fingerprint) {
        const Mapped m = map_file(path);
        Header h{};
        if (m.size < sizeof h) return std::nullopt;
        std::memcpy(&h, m.data.get(), sizeof h);
        if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0 || h.header_hash != hash_of(h)) {
            return std::nullopt;
        }
        const size_t ids = sizeof h, offsets = ids + padded(h.tokens * h.id_bytes);
        const bool sound = h.fingerprint == fingerprint &&
                           h.id_bytes == (encoder.vocabulary > 65536 ? 4u : 2u) &&
                           offsets + (h.documents + 1) * sizeof(uint64_t) == m.size &&
                           h.content_hash == hash_bytes(m.data.get() + ids, m.size - ids);
        if (!sound) return std::nullopt;
        const SourceStamp now = stamp(source);
        const bool touched = now.time != h.source_time;
        if (now.size != h.source_size || (touched && hash_file(source) != h.source_hash)) return std::nullopt;

        TokenFile f;
        f.map_ = m.data;
        f.ids_ = m.data.get() + ids;
        f.offsets_ = reinterpret_cast<const uint64_t*>(m.data.get() + offsets);
        f.wide_ = h.id_bytes == 4;
        f.tokens_ = static_cast<int64_t>(h.tokens);
        f.documents_ = static_cast<int64_t>(h.documents);
        f.text_bytes_ = static_cast<int64_t>(h.text_bytes);
        f.content_hash_ = h.content_hash;
        return f;
    }
};

TokenFile TokenFile::open(const Exec& ex, const fs::path& source, const fs::path& cache,
                          const TextEncoder& encoder, const DocumentOptions& options, bool* built) {
    stamp(source);
    const uint64_t fingerprint =
        hash_bytes(options.separator, hash_bytes(options.field, encoder.fingerprint));
    const fs::path path = cache_name(source, cache, fingerprint);
    auto file = TokenFileParser::parse(path, source, encoder, fingerprint);
    if (built != nullptr) *built = !file.has_value();
    if (!file) {
        make_directories(cache);
        build(ex, source, path, encoder, options, fingerprint);
        file = TokenFileParser::parse(path, source, encoder, fingerprint);
    }
    if (!file) fail(ErrorCode::io, "corpus", "`{}` changed while it was read", source.string());
    return *std::move(file);
}

void TokenFile::copy(int64_t begin, int64_t count, int32_t* to) const {
    if (wide_) {
        const auto* p = static_cast<const uint32_t*>(ids_) + begin;
        std::copy(p, p + count, to);
    } else {
        const auto* p = static_cast<const uint16_t*>(ids_) + begin;
        std::copy(p, p + count, to);
    }
}

}  // namespace ssm
