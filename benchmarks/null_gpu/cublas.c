/* cuBLAS: matrix products are logged with their sizes and types. Prototypes by their ABI alone. */
#include "null_gpu.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FP32 = 0, FP64 = 1, FP16 = 2, BF16 = 14 }; /* cudaDataType */

static const char *type_name(int type) {
    switch (type) {
    case FP32: return "fp32";
    case FP64: return "fp64";
    case FP16: return "fp16";
    case BF16: return "bf16";
    default: return "other";
    }
}

static int product(long m, long n, long k, long batch, int type, int result) {
    null_gpu_log("product\t%ld\t%ld\t%ld\t%ld\t%s\t%s\n", m, n, k, batch, type_name(type),
                 type_name(result));
    return 0;
}

/* State that nothing here depends on */

#define SUCCEEDS(name)                                                                             \
    int name(void) { return 0; }

SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetSmCountTarget)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)

int cublasCreate_v2(void **handle) { return *handle = calloc(1, 4096), 0; }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }

/* Products */

int cublasGemmEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
                 int a_type, int lda, const void *b, int b_type, int ldb, const void *beta, void *c,
                 int c_type, int ldc, int compute, int algorithm) {
    return product(m, n, k, 1, a_type, c_type);
}

int cublasGemmStridedBatchedEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha,
                               const void *a, int a_type, int lda, long long a_stride, const void *b,
                               int b_type, int ldb, long long b_stride, const void *beta, void *c,
                               int c_type, int ldc, long long c_stride, int batch, int compute,
                               int algorithm) {
    return product(m, n, k, batch, a_type, c_type);
}

int cublasSgemm_v2(void *handle, int ta, int tb, int m, int n, int k) {
    return product(m, n, k, 1, FP32, FP32);
}

int cublasDgemm_v2(void *handle, int ta, int tb, int m, int n, int k) {
    return product(m, n, k, 1, FP64, FP64);
}

int cublasSgemmStridedBatched(void *handle, int ta, int tb, int m, int n, int k, const float *alpha,
                              const float *a, int lda, long long a_stride, const float *b, int ldb,
                              long long b_stride, const float *beta, float *c, int ldc,
                              long long c_stride, int batch) {
    return product(m, n, k, batch, FP32, FP32);
}

int cublasSgemv_v2(void *handle, int ta, int m, int n) { return product(m, 1, n, 1, FP32, FP32); }

/* cuBLASLt describes the operands by layouts, which are made and freed around each product. */

typedef struct {
    uint64_t rows, columns;
    int type;
} Layout;

int cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t columns,
                               int64_t stride) {
    *layout = malloc(sizeof **layout);
    **layout = (Layout){rows, columns, type};
    return 0;
}

int cublasLtMatrixLayoutDestroy(Layout *layout) { return free(layout), 0; }

/* Of a description only whether the first operand is transposed is looked at. */
typedef struct {
    int32_t transposed;
} Description;

enum { DESCRIPTION_TRANSA = 3 };

int cublasLtMatmulDescCreate(Description **description, int compute, int scale) {
    return *description = calloc(1, sizeof **description), 0;
}

int cublasLtMatmulDescDestroy(Description *description) { return free(description), 0; }

int cublasLtMatmulDescSetAttribute(Description *description, int attribute, const void *value,
                                   size_t size) {
    if (attribute == DESCRIPTION_TRANSA)
        memcpy(&description->transposed, value, sizeof description->transposed);
    return 0;
}

int cublasLtMatmulPreferenceCreate(void **preference) { return *preference = calloc(1, 256), 0; }
int cublasLtMatmulPreferenceDestroy(void *preference) { return free(preference), 0; }

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, void *results, int *found) {
    memset(results, 0, 96); /* cublasLtMatmulHeuristicResult_t: state 0 is success */
    return *found = 1, 0;
}

int cublasLtMatmul(void *handle, Description *description, const void *alpha, const void *a,
                   Layout *a_layout, const void *b, Layout *b_layout, const void *beta, const void *c,
                   Layout *c_layout, void *d, Layout *d_layout) {
    long k = description->transposed ? a_layout->rows : a_layout->columns;
    return product(d_layout->rows, d_layout->columns, k, 1, a_layout->type, d_layout->type);
}

size_t cublasLtGetVersion(void) { return 130101; }
