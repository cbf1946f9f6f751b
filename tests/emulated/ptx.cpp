// What a warp does to matrices together, once for all lanes. Not compiled with the checks: what it reads are words that lanes have brought.
#include <cmath>
#include <cstring>

#include "machine.h"
#include "memory.h"

namespace emulated {

struct Pair {
  float low, high;
};

namespace {

struct Brought {  // to a product
  float a[8], b[4], c[4];
};
static_assert(sizeof(Brought) == 8 * sizeof(uint64_t));

// Lane 4 r + q has of A rows r and r + 8, columns 2 q and 2 q + 1, and then the same 8 columns further; of B column r, rows 2 q and 2 q + 1,
// and 8 further; of the sums rows r and r + 8, columns 2 q and 2 q + 1.
void product(uint64_t* words) {
  float a[16][16], b[16][8], c[16][8];
  Brought* const lanes = reinterpret_cast<Brought*>(words);
  for (int l = 0; l < warp_size; ++l) {
    const int r = l / 4, q = l % 4;
    for (int i = 0; i < 8; ++i) a[r + i / 2 % 2 * 8][2 * q + i % 2 + i / 4 * 8] = lanes[l].a[i];
    for (int i = 0; i < 4; ++i) b[2 * q + i % 2 + i / 2 * 8][r] = lanes[l].b[i];
    for (int i = 0; i < 4; ++i) c[r + i / 2 * 8][2 * q + i % 2] = lanes[l].c[i];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] = std::fma(a[i][k], b[k][j], c[i][j]);
  for (int l = 0; l < warp_size; ++l)
    for (int i = 0; i < 4; ++i) lanes[l].c[i] = c[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
}

}  // namespace

void multiply(float* const (&sums)[4], const Pair (&values)[6]) {
  Brought own;
  memcpy(own.a, values, sizeof own.a + sizeof own.b);
  for (int i = 0; i < 4; ++i) own.c[i] = *sums[i];
  uint64_t words[8];
  memcpy(words, &own, sizeof own);
  const uint64_t* const all = meet("mma.sync", words, 8, product);
  memcpy(&own, all + 8 * lane(), sizeof own);
  for (int i = 0; i < 4; ++i) *sums[i] = own.c[i];
}

// ldmatrix.x4: lane 8 i + j brings the address of row j of matrix i; lane 4 r + q gets items 2 q and 2 q + 1 of row r, or of column r.
void load_matrices(bool transpose, uint32_t* const (&results)[4], uint32_t at) {
  const unsigned char* const row = shared_at(at, 16, 16);
  touch(row, 16, Access::read, 16);
  uint64_t words[2];
  memcpy(words, row, 16);
  const uint64_t* const all = meet(transpose ? "ldmatrix.trans" : "ldmatrix", words, 2);
  const int r = lane() / 4, q = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const auto item = [&](int y, int x) -> uint32_t {
      uint16_t bits;
      memcpy(&bits, reinterpret_cast<const char*>(all + 2 * (8 * i + y)) + 2 * x, 2);
      return bits;
    };
    *results[i] = transpose ? item(2 * q, r) | item(2 * q + 1, r) << 16 : item(r, 2 * q) | item(r, 2 * q + 1) << 16;
  }
}

uint32_t transpose_matrix(uint32_t x) {  // movmatrix: lane 4 r + q has columns 2 q and 2 q + 1 of row r
  const uint64_t word = x;
  const uint64_t* const all = meet("movmatrix", &word, 1);
  const int r = lane() / 4, q = lane() % 4;
  const auto item = [&](int row, int column) { return static_cast<uint32_t>(all[4 * row + column / 2] >> (16 * (column % 2)) & 0xffff); };
  return item(2 * q, r) | item(2 * q + 1, r) << 16;
}

}  // namespace emulated
