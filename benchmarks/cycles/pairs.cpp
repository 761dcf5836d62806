// Times today's pair codes; of its own, so that the package's headers meet no other names.

#include "pairs.h"

int main() {
    std::mt19937 random(0);
    cycles::time_pairs<4>(random);
    cycles::time_pairs<6>(random);
    cycles::time_pairs<8>(random);
}
