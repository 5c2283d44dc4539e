// Memory in segments, handed out in pieces: a piece of a large segment when the large block is not needed,
// and joined with its free neighbours when it comes back. Where blocks of very different sizes are wanted one
// after the other (a tile of logits, then a layer's gradients) one memory serves them all, which lists of
// free blocks by size cannot.
#pragma once

#include <cstddef>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace ssm {

class Segments {
public:
    struct Piece {
        std::byte* data;
        size_t bytes;
    };
    // Sizes are multiples of it, so that no sliver stays behind.
    static constexpr size_t kGranule = size_t{256} << 10;

    // The smallest free piece that is large enough, or its front; nullptr where there is none.
    std::byte* take(size_t bytes);
    // A new segment, in use as a whole.
    void add(std::byte* p, size_t bytes);
    // Back, from take(), add() or take_free(). False: not one of these.
    bool give(std::byte* p) noexcept;
    // Takes what of these pieces is free; they may overlap.
    std::vector<Piece> take_free(const std::vector<Piece>& pieces);
    // The segments that are free as a whole; forgets them.
    std::vector<Piece> remove_free();

private:
    struct State {
        size_t bytes;
        bool free, starts_segment;
    };
    using Pieces = std::map<std::byte*, State>;
    void set_free(Pieces::iterator p, bool free);
    void split(Pieces::iterator p, size_t bytes);  // p keeps `bytes`, the rest comes after it
    void join_next(Pieces::iterator p);            // where that is free and of the same segment

    Pieces pieces_;                                 // by address; a segment's cover it without gaps
    std::set<std::pair<size_t, std::byte*>> free_;  // by size
};

}  // namespace ssm
