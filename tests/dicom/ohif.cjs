// Load reports with the SOP class handler of OHIF's extension for structured reports, and print what it reads as JSON.
//
//     npm install dcmjs @babel/runtime @cornerstonejs/adapters
//     npm pack @ohif/extension-cornerstone-dicom-sr && tar xzf ohif-extension-*.tgz
//     node ohif.cjs FOLDER FILE...
//
// FOLDER contains node_modules/ and package/ of these commands. The handler, its reading rules, dcmjs and the adapters are
// the published ones. React, cornerstone and the services of the viewer, which the handler does not need, are stubs.
const Module = require("module");
const fs = require("fs");
const path = require("path");

const [folder, ...files] = process.argv.slice(2);
const fromFolder = Module.createRequire(path.resolve(folder, "index.js"));

function stub(name) {
  return new Proxy(function () {}, {
    get: (target, key) => {
      if (key === "__esModule") return true;
      if (key === Symbol.toPrimitive) return () => name;
      if (key === Symbol.iterator) return function* () {};
      return key === "prototype" ? {} : stub(`${name}.${String(key)}`);
    },
    apply: () => stub(`${name}()`),
    construct: () => ({}),
  });
}

class ImageSet {}
const utils = {
  sortStudyInstances: (instances) => instances,
  sortDisplaySetsCopy: (sets) => [...sets],
  guid: () => "guid",
  toNumber: Number,
  sopClassDictionary: {
    BasicTextSR: "1.2.840.10008.5.1.4.1.1.88.11",
    EnhancedSR: "1.2.840.10008.5.1.4.1.1.88.22",
    ComprehensiveSR: "1.2.840.10008.5.1.4.1.1.88.33",
    Comprehensive3DSR: "1.2.840.10008.5.1.4.1.1.88.34",
  },
};
const core = { __esModule: true, utils, classes: { ImageSet, MetadataProvider: {} }, log: console };
core.default = core;
const modules = {
  "@ohif/core": new Proxy(core, { get: (target, key) => (key in target ? target[key] : stub(String(key))) }),
};
const load = Module._load;
Module._load = function (request, parent, ...rest) {
  if (request in modules) return modules[request];
  const isReal = /node_modules/.test(parent?.filename ?? "") || /^[./]/.test(request) || Module.isBuiltin(request);
  return isReal ? load.call(this, request, parent, ...rest) : stub(request);
};
Object.assign(globalThis, { self: globalThis, window: globalThis, document: stub("document") });

async function main() {
  modules.dcmjs = await import(path.resolve(folder, "node_modules/dcmjs/build/dcmjs.es.js"));
  const adapters = path.resolve(folder, "node_modules/@cornerstonejs/adapters/dist/esm/index.js");
  modules["@cornerstonejs/adapters"] = await import(adapters);
  const { DicomMessage, DicomMetaDictionary } = modules.dcmjs.default.data;
  const extension = fromFolder("./package/dist/ohif-extension-cornerstone-dicom-sr.umd.js").default;
  const messages = [];
  const services = {
    displaySetService: { activeDisplaySets: [], subscribe() {}, EVENTS: {}, getDisplaySetsForReferences: () => [] },
    measurementService: { getSourceMappings: () => [], getSource: () => ({}) },
    uiNotificationService: { show: (message) => messages.push(message) },
    customizationService: { getCustomization() {}, getModeCustomization() {} },
  };
  const extensionManager = { getDataSources: () => [{}], getActiveDataSource: () => [{}] };
  const handlers = extension.getSopClassHandlerModule({ servicesManager: { services }, extensionManager });
  for (const file of files) {
    const data = new Uint8Array(fs.readFileSync(file));
    const instance = DicomMetaDictionary.naturalizeDataset(DicomMessage.readFile(data.buffer).dict);
    const handler = handlers.find((each) => each.sopClassUids.includes(instance.SOPClassUID));
    const [displaySet] = handler.getDisplaySetsFromSeries([instance]);
    await displaySet.load();
    const { referencedImages, measurements } = displaySet;
    console.log(JSON.stringify({ messages, referencedImages, measurements }));
  }
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
