// The token cache: the ids of one text file, on disk, memory-mapped.
//
//   ids      [tokens]       eos, document 0, eos, document 1, eos, ...     u16 if the vocabulary fits, else
//   u32 offsets  [documents+1]  position of the first id of each document, and at the end `tokens`      u64
//
// Every position but the first is a prediction target: document d with its end is offsets[d] ..
// offsets[d+1], predicted from the positions one earlier.
//
// The file lies in a cache folder under a name made of the source's path and the encoder. It is taken when
// its checksum is right and the source has the size and time of change noted in it, or, failing that, the
// same content hash; else it is built again. It appears whole or not at all (io/atomic_file.h).
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>

#include "ssm/core/exec.h"
#include "ssm/io/mapped_file.h"
#include "ssm/train/documents.h"
#include "ssm/train/encoder.h"

namespace ssm {

class TokenFile {
public:
    // The cached ids of `source`, built if need be (`built`, if given, tells). Encodes on ex.threads threads.
    // Throws Error: the source's (documents.h); bad_file when it has no documents; io when `cache` cannot be
    // written.
    static TokenFile open(const Exec& ex, const std::filesystem::path& source,
                          const std::filesystem::path& cache, const TextEncoder& encoder,
                          const DocumentOptions& options = {}, bool* built = nullptr);

    int64_t tokens() const { return tokens_; }
    int64_t documents() const { return documents_; }
    int64_t text_bytes() const { return text_bytes_; }  // UTF-8 bytes of the documents
    uint64_t content_hash() const { return content_hash_; }
    int64_t offset(int64_t document) const { return static_cast<int64_t>(offsets_[document]); }
    // ids[begin, begin + count) as i32.
    void copy(int64_t begin, int64_t count, int32_t* to) const;

private:
    TokenFile() = default;
    // The file if it is sound and made from this source.
    static std::optional<TokenFile> parse(const std::filesystem::path& path,
                                          const std::filesystem::path& source, const TextEncoder& encoder,
                                          uint64_t fingerprint);

    std::shared_ptr<const MappedFile> map_;
    const void* ids_ = nullptr;
    const uint64_t* offsets_ = nullptr;
    bool wide_ = false;
    int64_t tokens_ = 0, documents_ = 0, text_bytes_ = 0;
    uint64_t content_hash_ = 0;  // of ids and offsets
};

}  // namespace ssm
