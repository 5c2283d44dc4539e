#include "ssm/io/tokenizer/bpe.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <random>

#include "ssm/core/error.h"
#include "ssm/io/tokenizer/unicode.h"

namespace ssm::tokenizer {

namespace {

constexpr size_t kShort = 48;                        // symbols up to which scanning beats the heap
constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, SentencePiece's space
constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

[[noreturn]] void bad(std::string_view message) { fail(ErrorCode::bad_file, "tokenizer", "{}", message); }

void check_options(const nlohmann::json& model) {
    const auto& dropout = field(model, "dropout");
    if (!dropout.is_null() && !(dropout.is_number() && dropout.get<double>() == 0))
        fail(ErrorCode::unsupported, "tokenizer", "model.dropout makes ids random and is not supported");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
        const auto& v = field(model, key);
        if (!v.is_null() && !(v.is_string() && v.get_ref<const std::string&>().empty()))
            fail(ErrorCode::unsupported, "tokenizer", "model.{} is not supported", key);
    }
}

// Lowest rank first, then leftmost.
bool later(const BpeScratch::Candidate& a, const BpeScratch::Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
}

// Where the first space symbol begins that stands after another character; npos: nowhere.
size_t space_after_other(std::string_view text) {
    bool after_space = true;
    for (size_t at = 0; at < text.size();) {
        const bool space = text.substr(at).starts_with(kSpace);
        if (space && !after_space) return at;
        at += space ? kSpace.size() : 1;
        after_space = space;
    }
    return std::string_view::npos;
}

}  // namespace

MergeTable::MergeTable(size_t count)
    : slots_(std::bit_ceil(std::max<size_t>(count * 2, 16))), mask_(slots_.size() - 1) {
    std::random_device device;
    salt_ = (0x9E3779B97F4A7C15u ^ (static_cast<uint64_t>(device()) << 20)) | 1;
    shift_ = 64 - std::countr_zero(slots_.size());
}

void MergeTable::insert(int32_t left, int32_t right, Merge merge) {
    const uint64_t key = key_of(left, right);
    size_t at = slot(key);
    while (slots_[at].key != key && slots_[at].key != kEmpty) at = (at + 1) & mask_;
    slots_[at] = {key, merge};
}

BpeModel::BpeModel(const Document& document) : merges_(document.merges.size()) {
    const auto& model = field(document.rest, "model");
    const auto& type = field(model, "type");
    if (!type.is_null() && type != "BPE")
        fail(ErrorCode::unsupported, "tokenizer", "model type {} is not supported",
             type.is_string() ? shown(type.get<std::string>()) : "that is not text");
    if (!document.has_vocab) bad("model.vocab is missing or not an object");
    if (!document.has_merges) bad("model.merges is missing or not a list");
    check_options(model);

    int64_t size = 0;
    for (const auto& [token, id] : document.vocab) size = std::max(size, id + 1);
    tokens_.resize(static_cast<size_t>(size));
    present_.resize(static_cast<size_t>(size));
    ids_.reserve(document.vocab.size());
    for (const auto& [token, id] : document.vocab) {
        const auto at = static_cast<size_t>(id);
        if (present_[at])
            bad(fmt::format("tokens {} and {} have the same id {}", shown(tokens_[at]), shown(token), id));
        present_[at] = true;
        tokens_[at] = token;
        if (!ids_.emplace(tokens_[at], static_cast<int32_t>(id)).second)
            bad(fmt::format("token {} appears twice in model.vocab", shown(token)));
    }

    std::string merged;
    for (size_t rank = 0; rank < document.merges.size(); ++rank) {
        const auto& [left, right] = document.merges[rank];
        merged.assign(left).append(right);
        const int32_t left_id = find(left), right_id = find(right), id = find(merged);
        for (const auto& [token, found] : {std::pair(&left, left_id), {&right, right_id}, {&merged, id}})
            if (found < 0) bad(fmt::format("merge {}: {} is not in model.vocab", rank, shown(*token)));
        merges_.insert(left_id, right_id, {static_cast<int32_t>(rank), id});
    }

    byte_fallback_ = bool_field(model, "byte_fallback", false, "model");
    fuse_unknown_ = bool_field(model, "fuse_unk", false, "model");
    ignore_merges_ = bool_field(model, "ignore_merges", false, "model");
    if (!field(model, "unk_token").is_null()) unknown_ = string_field(model, "unk_token", "model");
    for (int b = 0; b < 256; ++b) {
        byte_ids_.push_back(find(byte_to_character(static_cast<uint8_t>(b))));
        fallback_ids_.push_back(find(fmt::format("<0x{:02X}>", b)));
    }
    all_bytes_ = std::ranges::all_of(byte_ids_, [](int32_t id) { return id >= 0; });
    parts_ = never_joins_spaces(document);
}

// Whether a piece may be cut before each space symbol that stands after another character: the space symbol
// is a symbol of its own, what stands before it leaves a symbol too, and no merge reaches over the cut.
bool BpeModel::never_joins_spaces(const Document& document) const {
    const bool all_fall_back =
        byte_fallback_ && std::ranges::all_of(fallback_ids_, [](int32_t id) { return id >= 0; });
    if (ignore_merges_ || find(kSpace) < 0 || (unknown_.empty() && !all_fall_back)) return false;
    return std::ranges::all_of(document.merges, [](const auto& merge) {
        return space_after_other(std::string(merge.first) + std::string(merge.second)) ==
               std::string_view::npos;
    });
}

std::string_view BpeModel::first_part(std::string_view piece) const {
    return parts_ ? piece.substr(0, space_after_other(piece)) : piece;
}

int32_t BpeModel::find(std::string_view token) const {
    const auto found = ids_.find(token);
    return found == ids_.end() ? -1 : found->second;
}

bool BpeModel::has(int32_t id) const { return id >= 0 && id < size() && present_[static_cast<size_t>(id)]; }

int32_t BpeModel::unknown_id() const {
    const int32_t id = find(unknown_);
    if (id < 0) bad(fmt::format("unk_token {} is not in model.vocab", shown(unknown_)));
    return id;
}

bool BpeModel::byte_fallback(std::string_view character, std::vector<int32_t>& ids) const {
    for (const char c : character)
        if (fallback_ids_[static_cast<uint8_t>(c)] < 0) return false;
    for (const char c : character) ids.push_back(fallback_ids_[static_cast<uint8_t>(c)]);
    return true;
}

// A character outside the vocabulary becomes its bytes, else the unknown token, else nothing. As in the
// reference, an unknown token is written only when the next known character or the end is reached.
void BpeModel::first_symbols(std::string_view text, std::vector<int32_t>& ids) const {
    int32_t pending = -1;
    for (size_t at = 0; at < text.size();) {
        const std::string_view character = text.substr(at, character_at(text, at).length);
        at += character.size();
        const int32_t id = find(character);
        if (id >= 0) {
            if (pending >= 0) ids.push_back(pending);
            pending = -1;
            ids.push_back(id);
        } else if (!(byte_fallback_ && byte_fallback(character, ids)) && !unknown_.empty()) {
            if (pending >= 0 && !fuse_unknown_) ids.push_back(pending);
            pending = unknown_id();
        }
    }
    if (pending >= 0) ids.push_back(pending);
}

void BpeModel::merge_short(BpeScratch& scratch) const {
    auto& ids = scratch.ids;
    auto& merges = scratch.merges;
    merges.clear();
    for (size_t i = 0; i + 1 < ids.size(); ++i) merges.push_back(merges_.find(ids[i], ids[i + 1]));
    while (true) {
        size_t best = 0;
        int32_t rank = kNever;
        for (size_t i = 0; i < merges.size(); ++i)
            if (merges[i].rank >= 0 && merges[i].rank < rank) rank = merges[best = i].rank;
        if (rank == kNever) return;
        ids[best] = merges[best].id;
        ids.erase(ids.begin() + static_cast<int64_t>(best) + 1);
        merges.erase(merges.begin() + static_cast<int64_t>(best));
        if (best > 0) merges[best - 1] = merges_.find(ids[best - 1], ids[best]);
        if (best < merges.size()) merges[best] = merges_.find(ids[best], ids[best + 1]);
    }
}

void BpeModel::merge_long(BpeScratch& scratch) const {
    auto& symbols = scratch.symbols;
    auto& heap = scratch.heap;
    const auto count = static_cast<int32_t>(scratch.ids.size());
    symbols.clear();
    heap.clear();
    for (int32_t i = 0; i < count; ++i) {
        symbols.push_back({scratch.ids[static_cast<size_t>(i)], i - 1, i + 1 < count ? i + 1 : -1});
    }
    const auto at = [&](int32_t i) -> BpeScratch::Symbol& { return symbols[static_cast<size_t>(i)]; };
    const auto consider = [&](int32_t left) {
        const MergeTable::Merge merge = merges_.find(at(left).id, at(at(left).next).id);
        if (merge.rank >= 0) heap.push_back({merge.rank, left, merge.id});
        return merge.rank >= 0;
    };
    for (int32_t i = 0; i + 1 < count; ++i) consider(i);
    std::ranges::make_heap(heap, later);
    while (!heap.empty()) {
        const BpeScratch::Candidate top = heap.front();
        std::ranges::pop_heap(heap, later);
        heap.pop_back();
        auto& left = at(top.position);
        if (left.id < 0 || left.next < 0) continue;  // swallowed, or last
        auto& right = at(left.next);
        if (merges_.find(left.id, right.id).id != top.id) continue;  // no longer that pair
        left.id = top.id;
        left.next = right.next;
        right.id = -1;
        if (left.next >= 0) at(left.next).previous = top.position;
        if (left.previous >= 0 && consider(left.previous)) std::ranges::push_heap(heap, later);
        if (left.next >= 0 && consider(top.position)) std::ranges::push_heap(heap, later);
    }
    scratch.ids.clear();
    for (int32_t i = 0; i >= 0 && i < count; i = at(i).next) scratch.ids.push_back(at(i).id);
}

void BpeModel::encode(std::string_view piece, bool raw_bytes, BpeScratch& scratch,
                      std::vector<int32_t>& out) const {
    auto& ids = scratch.ids;
    ids.clear();
    if (raw_bytes && (!all_bytes_ || ignore_merges_)) {
        scratch.text.clear();
        for (const char c : piece) scratch.text.append(byte_to_character(static_cast<uint8_t>(c)));
        piece = scratch.text;
        raw_bytes = false;
    }
    if (ignore_merges_) {
        const int32_t whole = find(piece);
        if (whole >= 0) return out.push_back(whole);
    }
    if (raw_bytes) {
        for (const char c : piece) ids.push_back(byte_ids_[static_cast<uint8_t>(c)]);
    } else {
        first_symbols(piece, ids);
    }
    if (ids.size() > static_cast<size_t>(kNever))
        fail(ErrorCode::invalid_argument, "tokenizer", "a piece of {} symbols is too long", ids.size());
    if (ids.size() <= kShort)
        merge_short(scratch);
    else
        merge_long(scratch);
    out.insert(out.end(), ids.begin(), ids.end());
}

}  // namespace ssm::tokenizer
