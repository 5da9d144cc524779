// How the losses cut a sample's locations into tiles.
#pragma once
#include <cstdint>

namespace star {

constexpr int64_t LOSS_TILE = 4096;  // locations that are summed up by themselves: so sums depend on neither threads nor batch
constexpr int64_t LOSS_TILES = 4;    // neighbors that one call may take: memory is read in longer runs

// Of a sample. Args: has its batch, channels and locations, and whether they are packed, (B, L, C) instead of (B, C, H, W).
template <typename Args>
int64_t tiles(const Args& args) {
  return (args.locations + LOSS_TILE - 1) / LOSS_TILE;
}

}  // namespace star
