// adversarial_loss on the CPU: which thread does which piece of which head. The loops are in adversarial_loss_kernel.cpp.
//
// A head is summed in pieces that its size alone decides, and these are added up in order, so a result does not depend
// on the number of threads.
#include <string>
#include <tuple>
#include <vector>

#include "adversarial_loss_kernel.h"
#include "capability.h"
#include "floats.h"
#include "tensors.h"

namespace fastdistill {
namespace {

constexpr int64_t kPiece = 16384;
constexpr int64_t kColumns = 5;  // of the statistics: mean f, mean logit, share > 0, share < 0, mean sign

const AdversarialLossKernels& kernels_for(ScalarType type) {
  const Element element = element_of(type);
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::Avx512:
      return avx512::adversarial_loss_kernels(element);
    case Capability::Avx2:
      return avx2::adversarial_loss_kernels(element);
    default:
      break;
  }
#endif
  return baseline::adversarial_loss_kernels(element);
}

LossFunction function_of(const std::string& name) {
  if (name == "hinge") return LossFunction::Hinge;
  if (name == "linear") return LossFunction::Linear;
  STD_TORCH_CHECK(name == "softplus", "function: expected hinge, linear or softplus, got ", name);
  return LossFunction::Softplus;
}

// A run of one head's logits.
struct Piece {
  size_t head;
  int64_t first, count;
};

std::vector<Piece> pieces_of(const std::vector<Tensor>& logits) {
  std::vector<Piece> pieces;
  for (size_t head = 0; head < logits.size(); ++head) {
    const int64_t count = logits[head].numel();
    for (int64_t first = 0; first < count; first += kPiece) {
      pieces.push_back({head, first, std::min(kPiece, count - first)});
    }
  }
  return pieces;
}

// body(index of the piece, piece) for all, in parallel.
template <typename Body>
void for_pieces(const std::vector<Piece>& pieces, const Body& body) {
  const int64_t count = static_cast<int64_t>(pieces.size());
  parallel_for(0, count, tasks_per_thread(kPiece), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i, pieces[i]);
  });
}

// The first `ups` heads are to be raised, the others lowered.
std::tuple<Tensor, Tensor> adversarial_loss(const std::vector<Tensor>& logits, int64_t ups, const std::string& function,
                                            double weight) {
  const LossFunction f = function_of(function);
  const int64_t heads = static_cast<int64_t>(logits.size()), downs = heads - ups;
  const std::vector<Piece> pieces = pieces_of(logits);
  std::vector<LogitSums> sums(pieces.size());
  for_pieces(pieces, [&](int64_t i, const Piece& piece) {
    const Tensor& t = logits[piece.head];
    const char* const data = static_cast<const char*>(t.const_data_ptr()) + piece.first * t.element_size();
    const float sign = static_cast<int64_t>(piece.head) < ups ? -1.0f : 1.0f;
    sums[i] = kernels_for(t.scalar_type()).sums(f, sign, data, piece.count);
  });

  std::vector<double> rows((2 + heads) * kColumns);
  for (size_t i = 0; i < pieces.size(); ++i) {
    double* const row = &rows[(2 + pieces[i].head) * kColumns];
    row[0] += sums[i].loss;
    row[1] += sums[i].logits;
    row[2] += sums[i].positive;
    row[3] += sums[i].negative;
  }
  double total = 0;
  for (int64_t head = 0; head < heads; ++head) {
    double* const row = &rows[(2 + head) * kColumns];
    const double count = static_cast<double>(std::max<int64_t>(1, logits[head].numel()));
    for (int64_t column = 0; column < 4; ++column) row[column] /= count;
    row[4] = row[2] - row[3];
    const bool up = head < ups;
    double* const group = &rows[up ? 0 : kColumns];
    for (int64_t column = 0; column < kColumns; ++column) {
      group[column] += row[column] / static_cast<double>(up ? ups : downs);
    }
    total += row[0];
  }
  Tensor loss = new_floats({}), statistics = new_floats({2 + heads, kColumns});
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(weight * total);
  std::copy(rows.begin(), rows.end(), static_cast<float*>(statistics.mutable_data_ptr()));
  return {loss, statistics};
}

std::vector<Tensor> adversarial_loss_backward(const Tensor& grad_loss, const std::vector<Tensor>& logits, int64_t ups,
                                              const std::string& function, double weight) {
  const LossFunction f = function_of(function);
  float seed;
  read_floats(grad_loss, 0, 1, 1, &seed);
  std::vector<Tensor> grads;
  std::vector<char*> to;
  for (const Tensor& t : logits) {
    grads.push_back(new_output(t));
    to.push_back(static_cast<char*>(grads.back().mutable_data_ptr()));
  }
  for_pieces(pieces_of(logits), [&](int64_t, const Piece& piece) {
    const Tensor& t = logits[piece.head];
    const int64_t offset = piece.first * static_cast<int64_t>(t.element_size());
    const float sign = static_cast<int64_t>(piece.head) < ups ? -1.0f : 1.0f;
    const float scale = sign * static_cast<float>(seed * (weight / static_cast<double>(t.numel())));
    kernels_for(t.scalar_type())
        .gradient(f, sign, scale, static_cast<const char*>(t.const_data_ptr()) + offset, to[piece.head] + offset,
                  piece.count);
  });
  return grads;
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("adversarial_loss.cpu", TORCH_BOX(&fastdistill::adversarial_loss));
  m.impl("adversarial_loss_backward.cpu", TORCH_BOX(&fastdistill::adversarial_loss_backward));
}
