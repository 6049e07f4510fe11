// Makes the plan of each call on standard input, "rows columns vector", and walks all of its threads. Prints for each:
// the least and the greatest number of threads that own an element, how many own one outside, blocks, the greatest number of rows of a thread, and
// the share of thread places that own something, in percent.
#include "../../csrc/cuda/geglu_plan.h"

#include <algorithm>
#include <cstdio>
#include <vector>

int main() {
  using namespace fastdistill::cuda::geglu_plan;
  long long rows, columns;
  int vector;
  while (std::scanf("%lld %lld %d", &rows, &columns, &vector) == 3) {
    const Plan p = plan(rows, columns, vector);
    std::vector<unsigned char> owners(rows * columns, 0);
    long long most_rows = 0, places = 0, outside = 0;
    for (long long block = 0; block < p.blocks(); ++block) {
      for (int thread = 0; thread < kThreads; ++thread) {
        const Place place(p, rows, columns, vector, static_cast<unsigned>(block), thread);
        long long owned = 0;
        for (int64_t row = place.row; row < place.last; row += p.along, ++owned) {
          for (int64_t c = place.column; c < place.column + vector; ++c) {
            if (row >= rows || c >= columns) ++outside;
            else ++owners[row * columns + c];
          }
        }
        most_rows = std::max(most_rows, owned);
        places += owned;
      }
    }
    const auto [least, greatest] = std::minmax_element(owners.begin(), owners.end());
    const double capacity = static_cast<double>(p.blocks()) * p.rows * p.across;
    std::printf("%d %d %lld %lld %lld %.1f\n", *least, *greatest, outside, static_cast<long long>(p.blocks()), most_rows,
                100.0 * static_cast<double>(places) / capacity);
  }
}
