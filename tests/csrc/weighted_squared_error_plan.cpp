// Makes the plan of each call on standard input, "samples length vector cluster", and walks all of its threads. Prints
// for each: the least and the greatest number of threads that own an element, how many own one outside, blocks, whether
// they are one cluster, and the greatest number of vectors of a thread.
#include "../../csrc/cuda/weighted_squared_error_plan.h"

#include <algorithm>
#include <cstdio>
#include <vector>

int main() {
  using namespace fastdistill::cuda::weighted_squared_error;
  long long samples, length;
  int vector, cluster;
  while (std::scanf("%lld %lld %d %d", &samples, &length, &vector, &cluster) == 4) {
    const Plan p = plan(samples, length, vector, cluster);
    std::vector<unsigned char> owners(samples * length, 0);
    long long outside = 0, most = 0;
    for (long long block = 0; block < p.blocks(); ++block) {
      for (int thread = 0; thread < kThreads; ++thread) {
        const Place place(p, samples, length, static_cast<unsigned>(block), thread);
        long long owned = 0;
        for (int64_t first = place.column; first < place.end; first += place.step, ++owned) {
          for (int64_t c = first; c < first + vector; ++c) {
            if (place.row >= samples || c >= length) ++outside;
            else ++owners[place.row * length + c];
          }
        }
        most = std::max(most, owned);
      }
    }
    const auto [least, greatest] = std::minmax_element(owners.begin(), owners.end());
    std::printf("%d %d %lld %lld %d %lld\n", *least, *greatest, outside, static_cast<long long>(p.blocks()), p.cluster,
                most);
  }
}
