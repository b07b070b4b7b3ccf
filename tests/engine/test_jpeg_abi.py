"""What `engine/_jpeg_abi.h` says of libjpeg's structures, against the library's own header where its development files are."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from engine import jpeg_region

ENGINE = Path(__file__).parents[2] / "engine"


def fields(names: str) -> list[str]:
    """Of a structure, or constants, by name."""
    return names.split()


STRUCTURES = {
    "struct jpeg_decompress_struct": fields(
        "err src image_width image_height num_components jpeg_color_space out_color_space output_gamma dct_method "
        "output_width output_scanline coef_bits quant_tbl_ptrs dc_huff_tbl_ptrs ac_huff_tbl_ptrs data_precision "
        "comp_info progressive_mode arith_code restart_interval saw_JFIF_marker saw_Adobe_marker Adobe_transform "
        "CCIR601_sampling marker_list max_h_samp_factor max_v_samp_factor total_iMCU_rows sample_range_limit "
        "comps_in_scan cur_comp_info blocks_in_MCU MCU_membership Ss Se Ah Al unread_marker "
    ),
    "struct jpeg_common_struct": fields("err "),
    "struct jpeg_error_mgr": fields(
        "error_exit emit_message output_message msg_code msg_parm num_warnings jpeg_message_table last_jpeg_message "
        "addon_message_table "
    ),
    "struct jpeg_source_mgr": fields("next_input_byte bytes_in_buffer "),
    "jpeg_component_info": fields(
        "component_id h_samp_factor v_samp_factor quant_tbl_no dc_tbl_no ac_tbl_no quant_table dct_table "
    ),
    "JQUANT_TBL": fields("quantval sent_table "),
    "JHUFF_TBL": fields("bits huffval sent_table "),
}
CONSTANTS = fields(
    "JPEG_LIB_VERSION JPEG_HEADER_OK JPEG_MAX_DIMENSION DCTSIZE DCTSIZE2 TRUE JCS_GRAYSCALE JCS_RGB JCS_YCbCr "
    "JDCT_ISLOW NUM_QUANT_TBLS NUM_HUFF_TBLS MAX_COMPS_IN_SCAN D_MAX_BLOCKS_IN_MCU NUM_ARITH_TBLS "
)


def laid_out(header: str, folder: Path) -> str:
    """Sizes, offsets and constants as a C compiler has them with this header."""
    told = [f'printf("sizeof {name} %zu\\n", sizeof({name}));' for name in (*STRUCTURES, "JDIMENSION", "boolean")]
    told += [
        f'printf("{name}.{field} %zu of %zu\\n", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));'
        for name, members in STRUCTURES.items()
        for field in members
    ]
    told += [f'printf("{name} %ld\\n", (long){name});' for name in CONSTANTS]
    source, program = folder / "layout.c", folder / "layout"
    source.write_text(
        f"#include <stdio.h>\n#include <stddef.h>\n#include {header}\nint main(void) {{\n{chr(10).join(told)}\n}}\n"
    )
    subprocess.run(["cc", str(source), "-o", str(program)], check=True, capture_output=True, text=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif(not Path("/usr/include/jpeglib.h").exists(), reason="no jpeglib.h (Debian: libjpeg62-turbo-dev)")
def test_every_structure_is_laid_out_as_the_librarys_header_has_it(tmp_path: Path) -> None:
    theirs = laid_out("<jpeglib.h>", tmp_path)
    assert theirs.count("\n") > 70
    assert laid_out(f'"{ENGINE / "_jpeg_abi.h"}"', tmp_path) == theirs


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif(not (Path(sysconfig.get_path("include")) / "Python.h").exists(), reason="no Python.h")
def test_the_decoder_of_regions_is_there_where_it_can_be_compiled() -> None:
    assert jpeg_region.usable()
