// Contracts of operators, one line per tensor. `Contract` gives every letter of a shape its value where it is first met
// and holds all later tensors to it; errors name the operator, the tensor and the values. It knows no kernel. Everything
// here is compiled once, for the plain instruction set, whatever the kernels around it are compiled for.
//
//     Contract c("rms_norm");
//     c.tensor("x", x, "TH", f32, rows);          // T and H are now known
//     c.tensor("weight", weight, "H", storage_types);
//     const int64_t tokens = c['T'];
#pragma once

#include "tensor.h"

namespace octavo {

enum Layout {
  packed,     // contiguous
  rows,       // the stride of dimension 0 is free, the rest is contiguous within a row
  last_only,  // only the last dimension has to be contiguous
};

class Contract {
 public:
  explicit Contract(const char* op) : op_(op) {}

  // Shape letters: an upper-case letter is bound by its first use, a digit stands for itself.
  void tensor(const char* name, const Tensor& t, const char* shape, uint32_t dtypes, Layout layout = packed);

  // Throws "<op>: <message>" unless `holds`; printf style, so that the values are in the message.
  __attribute__((format(printf, 3, 4))) void require(bool holds, const char* message, ...) const;

  // The value of a letter that an earlier tensor() has bound.
  int64_t operator[](char letter) const { return value_[letter - 'A']; }

 private:
  const char* op_;
  int64_t value_[26] = {};
  const char* owner_[26] = {};  // the tensor that bound the letter, null while unbound
};

}  // namespace octavo
