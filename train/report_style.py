"""The report's style sheet: light and dark, from phones to desktops, and on paper."""

STYLE = """
:root{--back:#fff;--text:#1a1c1f;--muted:#555b63;--line:#d5d9de;--soft:#f3f5f7;--real:#0b62a8;--fake:#b4450a;--one:#0b62a8;
--two:#8a2f8f;--three:#4d6b12;--band:#e7e3f3}
@media(prefers-color-scheme:dark){:root{--back:#14171a;--text:#e8eaed;--muted:#a6adb5;--line:#3a4047;--soft:#1d2125;
--real:#6cb2f5;--fake:#ff9d5c;--one:#6cb2f5;--two:#e29be6;--three:#b5d66b;--band:#2d2a3d}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif}
header,main{max-width:1080px;margin:0 auto;padding:0 16px}
header{padding-top:20px}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:36px 0 8px;border-bottom:1px solid var(--line);padding-bottom:4px}
h3{font-size:1rem;margin:20px 0 6px}
p{margin:0 0 12px;max-width:75ch}
header p,small{color:var(--muted)}
a{color:var(--one)}
:focus-visible{outline:3px solid var(--fake);outline-offset:2px}
.skip{position:absolute;left:-999px}
.skip:focus{left:8px;top:8px;background:var(--back);padding:8px;z-index:1}
nav ul{display:flex;flex-wrap:wrap;gap:4px 16px;list-style:none;padding:0;margin:8px 0}
nav a{display:inline-block;padding:6px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:12px;margin:0 0 12px}
.tiles div{background:var(--soft);border:1px solid var(--line);border-radius:6px;padding:10px 12px}
dt{color:var(--muted);font-size:.875rem}
dd{margin:0;font-size:1.375rem;font-variant-numeric:tabular-nums}
dd small{font-size:.875rem}
.notes{padding-left:20px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:20px 28px;margin:16px 0}
figure{margin:0}
.figures figure{max-width:520px}
.figures figcaption{font-weight:600;margin-bottom:4px}
.figures figure p{color:var(--muted);font-size:.875rem;margin:4px 0 0}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--text);font:13px system-ui,sans-serif}
.grid{stroke:var(--line);fill:none}
.even{stroke:var(--muted);stroke-dasharray:2 4;fill:none}
.line{fill:none;stroke-width:2}
.mark{fill-opacity:.7}
.band{fill:var(--band)}
.cut{stroke:var(--text);stroke-width:1.5}
path.real,polyline.real{stroke:var(--real)}path.fake,polyline.fake{stroke:var(--fake)}
path.one,polyline.one{stroke:var(--one)}path.two,polyline.two{stroke:var(--two)}path.three,polyline.three{stroke:var(--three)}
circle.real{fill:var(--real)}rect.fake{fill:var(--fake)}rect.one{fill:var(--one)}rect.two{fill:var(--two)}
.range{stroke:var(--muted);stroke-width:2;vector-effect:non-scaling-stroke}
.value{stroke:var(--text);stroke-width:3;vector-effect:non-scaling-stroke}
.bar{width:110px;height:14px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;padding:0;margin:4px 0;font-size:.875rem}
.legend li{display:flex;align-items:center;gap:6px}
.legend svg{width:28px;height:12px}
.scroll{overflow-x:auto;margin:12px 0}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding-bottom:6px}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
td{white-space:nowrap}
th[scope=row]{font-weight:400;min-width:9rem;overflow-wrap:anywhere}
#facts td{white-space:normal;overflow-wrap:anywhere;min-width:12rem}
.images{display:grid;grid-template-columns:repeat(auto-fill,minmax(130px,1fr));gap:12px;list-style:none;padding:0;margin:0}
.images img{display:block;max-width:112px;height:auto;background:var(--soft)}
.images figcaption{font-size:.8125rem;color:var(--muted);overflow-wrap:anywhere}
.images b{color:var(--text)}
@media(max-width:480px){svg text{font-size:15px}}
@media print{nav,.skip{display:none}.figures figure,tr{break-inside:avoid}.scroll{overflow:visible}}
"""
