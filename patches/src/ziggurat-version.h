#pragma once

#include "ziggurat-quant.h" // ZIGGURAT_API

#ifdef __cplusplus
extern "C" {
#endif

// The version of the patched build, e.g. "0.3.36+ziggurat.1". A stock libllama does not have this symbol.
ZIGGURAT_API const char * ziggurat_version(void);

// Hex digest over the upstream sources, the patches and our own files that this library was built from.
ZIGGURAT_API const char * ziggurat_source_hash(void);

#ifdef __cplusplus
}
#endif
