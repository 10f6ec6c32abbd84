#include "ziggurat-version.h"

#include "ziggurat-build.h" // written by the build backend: ZIGGURAT_VERSION, ZIGGURAT_SOURCE_HASH

extern "C" const char * ziggurat_version(void) {
    return ZIGGURAT_VERSION;
}

extern "C" const char * ziggurat_source_hash(void) {
    return ZIGGURAT_SOURCE_HASH;
}
