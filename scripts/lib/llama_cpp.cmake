# Shortens the build where speed buys nothing: what parses, renders and serves needs no -O3, and most of what the
# compiler reads for it are the same headers again, so eight files at a time are compiled as one. On two cores the
# build takes 4 min 48 s. ggml, which computes, is left alone.
function(build_faster)
    foreach(target llama llama-common server-context llama-server-impl cpp-httplib)
        if(TARGET ${target})
            target_compile_options(${target} PRIVATE -O1)
        endif()
    endforeach()
    if(TARGET mtmd) # pictures and sound: linked into the server, never used here
        target_compile_options(mtmd PRIVATE -O0)
    endif()
    foreach(target llama-common server-context llama-server-impl mtmd)
        if(TARGET ${target})
            set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 8)
        endif()
    endforeach()
    # One specializes templates that others instantiate; two refuse to see the headers of their neighbours.
    foreach(path common/json.cpp tools/mtmd/mtmd-helper.cpp tools/mtmd/mtmd-helper-gen.cpp)
        cmake_path(GET path PARENT_PATH folder)
        set_source_files_properties(
            ${CMAKE_SOURCE_DIR}/${path} DIRECTORY ${CMAKE_SOURCE_DIR}/${folder}
            PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON
        )
    endforeach()
endfunction()

# The logger prints from a thread of its own and is never ended, so that a program may end before its last lines are
# out: figures, and what was wrong. With this they are printed first.
function(print_last_lines)
    file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/print_last_lines.cpp @ONLY CONTENT [[
#include "log.h"
namespace { struct AtExit { ~AtExit() { common_log_pause(common_log_main()); } } at_exit; }
]])
    foreach(target llama-imatrix llama-perplexity)
        if(TARGET ${target})
            target_sources(${target} PRIVATE ${CMAKE_BINARY_DIR}/print_last_lines.cpp)
        endif()
    endforeach()
endfunction()

# After the whole tree was read, when its targets are there.
cmake_language(DEFER CALL build_faster)
cmake_language(DEFER CALL print_last_lines)
