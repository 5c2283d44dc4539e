#include "ssm/io/tokenizer/tokenizer.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "ssm/core/error.h"
#include "ssm/io/tokenizer/added_tokens.h"
#include "ssm/io/tokenizer/bpe.h"
#include "ssm/io/tokenizer/decoder.h"
#include "ssm/io/tokenizer/normalizer.h"
#include "ssm/io/tokenizer/pre_tokenizer.h"
#include "ssm/io/tokenizer/template.h"
#include "ssm/io/tokenizer/word_cache.h"
#include "ssm/io/zstd_reader.h"

namespace ssm {

namespace {

using namespace tokenizer;

// Working memory of one encode call.
struct EncodeScratch {
    RegexScratch regex;
    BpeScratch bpe;
    WordCache raw, mapped;  // pieces read as bytes, and as characters
};

// Scratches that wait for the next call: as many as calls ran at once, so threads share nothing.
class ScratchPool {
public:
    std::unique_ptr<EncodeScratch> take() {
        const std::lock_guard lock(mutex_);
        if (free_.empty()) return std::make_unique<EncodeScratch>();
        auto scratch = std::move(free_.back());
        free_.pop_back();
        return scratch;
    }
    void put(std::unique_ptr<EncodeScratch> scratch) {
        const std::lock_guard lock(mutex_);
        free_.push_back(std::move(scratch));
    }

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<EncodeScratch>> free_;
};

class Lease {
public:
    explicit Lease(ScratchPool& pool) : pool_(pool), scratch_(pool.take()) {}
    ~Lease() { pool_.put(std::move(scratch_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    EncodeScratch& operator*() const { return *scratch_; }

private:
    ScratchPool& pool_;
    std::unique_ptr<EncodeScratch> scratch_;
};

}  // namespace

struct Tokenizer::Impl {
    explicit Impl(const Document& document)
        : model(document),
          normalizer(field(document.rest, "normalizer")),
          added(document, model, normalizer),
          pre_tokenizer(field(document.rest, "pre_tokenizer")),
          post(document, added.size()),
          decoder(field(document.rest, "decoder")) {}

    void encode_piece(std::string_view piece, bool raw_bytes, EncodeScratch& scratch,
                      std::vector<int32_t>& ids) const;
    void encode_text(std::string_view text, bool at_start, EncodeScratch& scratch,
                     std::vector<int32_t>& ids) const;
    // Feeds the token of `id`; an id without one feeds nothing.
    void decode_one(int32_t id, bool skip_special, DecoderState& state) const;

    BpeModel model;
    Normalizer normalizer;
    AddedTokens added;
    PreTokenizer pre_tokenizer;
    Template post;
    Decoder decoder;
    mutable ScratchPool pool;
};

void Tokenizer::Impl::encode_piece(std::string_view piece, bool raw_bytes, EncodeScratch& scratch,
                                   std::vector<int32_t>& ids) const {
    if (piece.size() > WordCache::kMaxPiece) return model.encode(piece, raw_bytes, scratch.bpe, ids);
    WordCache& cache = raw_bytes ? scratch.raw : scratch.mapped;
    const uint64_t hash = WordCache::hash(piece);
    if (const auto known = cache.find(piece, hash); known.data() != nullptr) {
        ids.insert(ids.end(), known.begin(), known.end());
        return;
    }
    const size_t before = ids.size();
    model.encode(piece, raw_bytes, scratch.bpe, ids);
    cache.insert(piece, hash, std::span(ids).subspan(before));
}

// Text between the added tokens that are not normalized.
void Tokenizer::Impl::encode_text(std::string_view text, bool at_start, EncodeScratch& scratch,
                                  std::vector<int32_t>& ids) const {
    std::string normalized;
    if (!normalizer.empty()) text = normalized = normalizer.apply(text, scratch.regex);
    const PreTokenizer::Sink sink = [&](std::string_view piece, bool raw_bytes) {
        if (raw_bytes) return encode_piece(piece, raw_bytes, scratch, ids);
        while (!piece.empty()) {
            const std::string_view part = model.first_part(piece);
            encode_piece(part, raw_bytes, scratch, ids);
            piece.remove_prefix(part.size());
        }
    };
    added.split(
        text, true,
        [&](std::string_view part, size_t offset) {
            pre_tokenizer.run(part, at_start && offset == 0, scratch.regex, sink);
        },
        [&](int32_t id) { ids.push_back(id); });
}

void Tokenizer::Impl::decode_one(int32_t id, bool skip_special, DecoderState& state) const {
    if (const AddedToken* token = added.find(id)) {
        if (!(skip_special && token->special)) decoder.push(token->normalized_content, state);
    } else if (model.has(id)) {
        decoder.push(model.token(id), state);
    }
}

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::parse(std::string_view json) {
    return Tokenizer(std::make_unique<const Impl>(read_document(json)));
}

Tokenizer Tokenizer::load(const std::filesystem::path& path) {
    const auto file = std::filesystem::is_directory(path) ? path / "tokenizer.json" : path;
    const std::string json = read_whole_text(file);
    try {
        return parse(json);
    } catch (const Error& error) {
        constexpr std::string_view prefix = "[tokenizer] ";
        fail(error.code(), "tokenizer", "{}: {}", file.string(), error.what() + prefix.size());
    }
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special) const {
    if (const size_t at = first_invalid_utf8(text); at != std::string_view::npos)
        fail(ErrorCode::invalid_argument, "tokenizer", "text is not valid UTF-8 at byte {}", at);
    const Lease lease(impl_->pool);
    std::vector<int32_t> ids;
    if (add_special) ids = impl_->post.prefix();
    impl_->added.split(
        text, false,
        [&](std::string_view part, size_t offset) { impl_->encode_text(part, offset == 0, *lease, ids); },
        [&](int32_t id) { ids.push_back(id); });
    if (add_special) ids.insert(ids.end(), impl_->post.suffix().begin(), impl_->post.suffix().end());
    return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
    for (size_t i = 0; i < ids.size(); ++i)
        require(ids[i] >= 0 && ids[i] < size(), "tokenizer", "id {} at place {} is not in [0, {})", ids[i], i,
                size());
    DecoderState state;
    impl_->decoder.begin(state);
    for (const int32_t id : ids) impl_->decode_one(id, skip_special, state);
    impl_->decoder.finish(state);
    return std::move(state.out);
}

int32_t Tokenizer::size() const { return impl_->added.size(); }

std::optional<int32_t> Tokenizer::id_of(std::string_view token) const {
    if (const AddedToken* added = impl_->added.find(token)) return added->id;
    const int32_t id = impl_->model.find(token);
    return id < 0 ? std::nullopt : std::optional(id);
}

std::string_view Tokenizer::token(int32_t id) const {
    if (const AddedToken* added = impl_->added.find(id)) return added->content;
    return impl_->model.has(id) ? impl_->model.token(id) : std::string_view{};
}

bool Tokenizer::is_special(int32_t id) const {
    const AddedToken* added = impl_->added.find(id);
    return added != nullptr && added->special;
}

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(&tokenizer), skip_special_(skip_special), state_(std::make_unique<DecoderState>()) {
    tokenizer_->impl_->decoder.begin(*state_);
}
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder::~StreamDecoder() = default;

std::string StreamDecoder::push(int32_t id) {
    tokenizer_->impl_->decode_one(id, skip_special_, *state_);
    return std::exchange(state_->out, {});
}

std::string StreamDecoder::flush() {
    tokenizer_->impl_->decoder.finish(*state_);
    std::string out = std::move(state_->out);
    tokenizer_->impl_->decoder.begin(*state_);
    return out;
}

}  // namespace ssm
