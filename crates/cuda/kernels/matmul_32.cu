// Products with many rows of types in blocks of 32 weights.
#include "matmul.cuh"

FOR_QUANTIZED_32(MATMULS)
