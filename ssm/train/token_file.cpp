#include "ssm/train/token_file.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <span>
#include <string>
#include <vector>

#include "ssm/core/error.h"
#include "ssm/core/parallel.h"
#include "ssm/io/atomic_file.h"
#include "ssm/train/hash.h"

namespace ssm {
namespace fs = std::filesystem;

namespace {

constexpr char kMagic[8] = {'s', 's', 'm', 't', 'o', 'k', '0', '1'};

// The last bytes of the file; all integers little-endian.
struct Footer {
    char magic[8];
    uint64_t id_bytes, tokens, documents, text_bytes;
    uint64_t source_size, source_hash;
    int64_t source_time;  // nanoseconds
    uint64_t fingerprint;
    uint64_t content_hash;  // of all bytes before the footer, as blocks
    uint64_t footer_hash;   // of all fields above
};
static_assert(sizeof(Footer) == 88);

uint64_t hash_of(const Footer& f) { return hash_bytes(&f, offsetof(Footer, footer_hash)); }

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

uint64_t hash_file(const fs::path& path) {
    const auto map = MappedFile::open(path);
    return hash_blocks(map->bytes().data(), map->bytes().size());
}

fs::path cache_name(const fs::path& source, const fs::path& cache, uint64_t fingerprint) {
    const uint64_t place = hash_bytes(fs::absolute(source).lexically_normal().string(), fingerprint);
    return cache / fmt::format("{}-{:016x}.tokens", source.filename().string(), place);
}

// A stream into an AtomicFile in blocks, which are hashed on their way.
class HashedStream {
public:
    explicit HashedStream(AtomicFile& out) : out_(out) { block_.reserve(kHashBlock); }
    void write(const void* data, size_t bytes) {
        const auto* p = static_cast<const std::byte*>(data);
        while (bytes > 0) {
            const size_t count = std::min(bytes, kHashBlock - block_.size());
            block_.insert(block_.end(), p, p + count);
            p += count;
            bytes -= count;
            if (block_.size() == kHashBlock) flush();
        }
    }
    uint64_t finish() {
        if (!block_.empty()) flush();
        return hash_;
    }

private:
    void flush() {
        hash_ = hash_blocks(block_.data(), block_.size(), hash_);
        out_.write(block_);
        block_.clear();
    }
    AtomicFile& out_;
    std::vector<std::byte> block_;
    uint64_t hash_ = 0;
};

// Encodes documents in batches of a few MiB, the documents of a batch side by side.
class Builder {
public:
    Builder(const Exec& ex, const TextEncoder& encoder, AtomicFile& out, bool wide)
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
    // Writes the offsets; gives the counts.
    void finish(Footer& f) {
        f.tokens = tokens_;
        f.documents = offsets_.size();
        f.text_bytes = text_bytes_;
        offsets_.push_back(tokens_);
        const size_t bytes = tokens_ * f.id_bytes;
        const uint64_t zero = 0;
        out_.write(&zero, padded(bytes) - bytes);
        out_.write(offsets_.data(), offsets_.size() * sizeof(uint64_t));
        f.content_hash = out_.finish();
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
    HashedStream out_;
    bool wide_;
    uint64_t tokens_ = 0, text_bytes_ = 0;
    std::vector<uint64_t> offsets_;
    std::vector<uint16_t> narrow_;
};

bool is_wide(const TextEncoder& encoder) { return encoder.vocabulary > 65536; }

void build(const Exec& ex, const fs::path& source, const fs::path& target, const TextEncoder& encoder,
           const DocumentOptions& options, uint64_t fingerprint) {
    Footer f{};
    std::memcpy(f.magic, kMagic, sizeof kMagic);
    f.fingerprint = fingerprint;
    const SourceStamp before = stamp(source);  // a source that changes meanwhile makes the cache stale
    f.source_size = before.size;
    f.source_time = before.time;
    DocumentReader reader(source, options);
    f.source_hash = hash_file(source);
    f.id_bytes = is_wide(encoder) ? 4 : 2;

    AtomicFile out(target);
    Builder builder(ex, encoder, out, is_wide(encoder));
    builder.run(reader);
    builder.finish(f);
    if (f.documents == 0) fail(ErrorCode::bad_file, "corpus", "`{}` has no documents", source.string());
    f.footer_hash = hash_of(f);
    out.write(std::as_bytes(std::span(&f, 1)));
    out.commit();
}

}  // namespace

std::optional<TokenFile> TokenFile::parse(const fs::path& path, const fs::path& source,
                                          const TextEncoder& encoder, uint64_t fingerprint) {
    std::error_code ignored;
    if (!fs::is_regular_file(path, ignored) || fs::file_size(path, ignored) < sizeof(Footer)) {
        return std::nullopt;
    }
    const auto map = MappedFile::open(path);
    const auto bytes = map->bytes();
    if (bytes.size() < sizeof(Footer)) return std::nullopt;
    const size_t content = bytes.size() - sizeof(Footer);
    Footer f{};
    std::memcpy(&f, bytes.data() + content, sizeof f);
    if (std::memcmp(f.magic, kMagic, sizeof kMagic) != 0 || f.footer_hash != hash_of(f)) return std::nullopt;
    const size_t offsets = padded(f.tokens * f.id_bytes);
    const bool sound = f.fingerprint == fingerprint && f.id_bytes == (is_wide(encoder) ? 4u : 2u) &&
                       offsets + (f.documents + 1) * sizeof(uint64_t) == content &&
                       f.content_hash == hash_blocks(bytes.data(), content);
    if (!sound) return std::nullopt;
    const SourceStamp now = stamp(source);
    const bool touched = now.time != f.source_time;
    if (now.size != f.source_size || (touched && hash_file(source) != f.source_hash)) return std::nullopt;

    TokenFile t;
    t.map_ = map;
    t.ids_ = bytes.data();
    t.offsets_ = reinterpret_cast<const uint64_t*>(bytes.data() + offsets);
    t.wide_ = f.id_bytes == 4;
    t.tokens_ = static_cast<int64_t>(f.tokens);
    t.documents_ = static_cast<int64_t>(f.documents);
    t.text_bytes_ = static_cast<int64_t>(f.text_bytes);
    t.content_hash_ = f.content_hash;
    return t;
}

TokenFile TokenFile::open(const Exec& ex, const fs::path& source, const fs::path& cache,
                          const TextEncoder& encoder, const DocumentOptions& options, bool* built) {
    stamp(source);
    const uint64_t fingerprint =
        hash_bytes(options.separator, hash_bytes(options.field, encoder.fingerprint));
    const fs::path path = cache_name(source, cache, fingerprint);
    auto file = parse(path, source, encoder, fingerprint);
    if (built != nullptr) *built = !file.has_value();
    if (!file) {
        std::error_code error;
        fs::create_directories(cache, error);
        if (error) {
            fail(ErrorCode::io, "corpus", "cannot create the cache folder `{}`: {}", cache.string(),
                 error.message());
        }
        build(ex, source, path, encoder, options, fingerprint);
        file = parse(path, source, encoder, fingerprint);
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
