// How a tensor is laid out: (N, C, *spatial) read as (N, C, S) with the spatial dimensions collapsed, and (..., L) read
// as rows.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fastdistill {

struct Strides3 {
  int64_t n, c, s;
};

struct Layout {
  int64_t N, C, S;
  Strides3 stride;
  bool channels_last;
};

// The stride of the collapsed spatial dimensions. False where they cannot be walked with one stride.
inline bool collapse_spatial(const torch::stable::Tensor& t, int64_t* size, int64_t* stride) {
  *size = 1;
  *stride = 1;
  bool first = true;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (first) {
      *stride = t.stride(d);
      first = false;
    } else if (t.stride(d) != *stride * *size) {
      return false;
    }
    *size *= t.size(d);
  }
  return true;
}

// Contiguous (stride of S is 1, of C is S) or channels last (stride of C is 1). The Python side has checked that one of
// the two holds (fastdistill/ops/_layout.py keeps the same rule), so this only tells which.
inline Layout layout_of(const torch::stable::Tensor& x) {
  Layout out;
  out.N = x.size(0);
  out.C = x.size(1);
  int64_t s_stride = 1;
  STD_TORCH_CHECK(collapse_spatial(x, &out.S, &s_stride), "x: its spatial dimensions cannot be walked with one stride");
  out.stride = {x.stride(0), x.stride(1), s_stride};
  const bool contiguous = (out.S == 1 || s_stride == 1) && (out.C == 1 || out.stride.c == out.S);
  const bool channels_last = out.C == 1 || out.stride.c == 1;
  STD_TORCH_CHECK(contiguous || channels_last, "x: neither contiguous nor channels last");
  out.channels_last = !contiguous;
  // A dimension of one element may carry any stride; the kernels multiply by these.
  if (!out.channels_last) out.stride = {out.stride.n, out.S, 1};
  if (out.channels_last) out.stride.c = 1;
  return out;
}

// Any three strides: a gradient may arrive in the other layout, or expanded from one value.
inline Strides3 strides_of(const torch::stable::Tensor& t) {
  int64_t size = 1, stride = 1;
  STD_TORCH_CHECK(collapse_spatial(t, &size, &stride), "grad_y: its spatial dimensions cannot be walked with one stride");
  return {t.stride(0), t.stride(1), stride};
}

// (..., L) as `count` dense rows of `length` elements, `stride` apart.
struct Rows {
  int64_t count, length, stride;
};

// The Python side has checked that one stride walks the rows (collapse_rows in fastdistill/ops/_layout.py).
inline Rows rows_of(const torch::stable::Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  Rows rows{1, t.size(last), t.size(last)};
  STD_TORCH_CHECK(rows.length == 1 || t.stride(last) == 1, name, ": its rows are not dense");
  bool first = true;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (first) {
      rows.stride = t.stride(d);
      first = false;
    } else {
      STD_TORCH_CHECK(t.stride(d) == rows.stride * rows.count, name, ": its rows cannot be walked with one stride");
    }
    rows.count *= t.size(d);
  }
  return rows;
}

}  // namespace fastdistill
