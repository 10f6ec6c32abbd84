# Compiles our own files into libllama. Included by src/CMakeLists.txt; a new file in this folder needs no new line.

file(GLOB ZIGGURAT_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cpp)

target_sources(llama PRIVATE ${ZIGGURAT_SOURCES})
target_include_directories(llama PRIVATE ${CMAKE_CURRENT_LIST_DIR})

# upstream merges the model files into unity batches; ours keep their own translation units
set_source_files_properties(${ZIGGURAT_SOURCES} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)

# loops for vector units: the instructions that ggml's own are compiled for
if (TARGET ggml-cpu)
    get_target_property(ZIGGURAT_CPU_OPTIONS ggml-cpu COMPILE_OPTIONS)
    set_source_files_properties(
        ${CMAKE_CURRENT_LIST_DIR}/ziggurat-round.cpp PROPERTIES COMPILE_OPTIONS "${ZIGGURAT_CPU_OPTIONS}")
endif()
